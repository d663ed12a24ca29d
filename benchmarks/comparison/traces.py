"""Routes of a real router for a model whose own router is random: recorded, stretched, replayed.

    python -m benchmarks.comparison.traces --model DIR --text heldout --sequences 2 --out FILE

A checkpoint with random weights sends every token almost uniformly to all of its experts, which
makes every cache policy equal and says nothing about any of them. So the routes of all of this
project's arms are replayed. They are *recorded* on the demo model, which was trained, over text
that it did not see, and *stretched* to the shape that is measured:

* layer l of L follows the demo's layer l * L_demo // L;
* of the demo's router not the best 4 but the best k experts are taken, by its logits;
* each of the demo's experts e stands for E / E_demo consecutive experts, and which of them a token
  goes to is a fixed hash of (token, l, e): the same word takes the same experts in every place, as
  in a real model, and two layers that follow the same demo layer still differ.

The k experts of a token are distinct, because the demo's are. The gates stay the model's own. A
``Replay`` puts the recorded indices in the place of the router's, before the experts function sees
them, from outside of the package. Routes are recorded twice: over calibration text for ``fit``, so
that what it learns of routing (weights, pins, quotas) is what it would learn of a real model, and
over held-out text for the measurement.

Memory: layers * tokens * k bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parents[2] / "conmoe_edge" / "data" / "demo"
SEQUENCE = 512
_MIX = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


def stretch(ranking: Tensor, tokens: Tensor, *, layers: int, experts: int, top_k: int) -> Tensor:
    """Routes [layers, T, top_k] int64 from a small router's ranking.

    Args:
        ranking: [L_demo, T, E_demo], experts of every token and layer, best first.
        tokens: [T] token numbers.
        experts: a multiple of E_demo.
        top_k: not more than E_demo.
    """
    small_layers, _, small = ranking.shape
    if experts % small or top_k > small:
        raise ValueError(f"{small} experts cannot be stretched to {experts} with top-{top_k}")
    parts = experts // small
    rows = []
    for layer in range(layers):
        chosen = ranking[layer * small_layers // layers, :, :top_k]
        rows.append(chosen * parts + _hash(tokens.unsqueeze(1), layer, chosen) % parts)
    return torch.stack(rows)


def _hash(token: Tensor, layer: int, expert: Tensor) -> Tensor:
    """A fixed number below 2**16 for each (token, layer, expert)."""
    mixed = (token * _MIX[0] + layer * _MIX[1] + expert * _MIX[2]) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
    return (mixed ^ (mixed >> 12)) >> 8 & 0xFFFF


@torch.no_grad()
def record(tokens: Tensor) -> Tensor:
    """The demo model's ranking [L, N * T, E] over sequences ``tokens`` [N, T], from its router logits."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    rows: list[list[Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            logits = out[0] if isinstance(out, tuple) else out
            rows[layer].append(logits.reshape(-1, logits.shape[-1]))

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(keep(number))
    for sequence in tokens:
        model(sequence.unsqueeze(0), use_cache=False)
    logits = torch.stack([torch.cat(row) for row in rows])
    return logits.argsort(dim=-1, descending=True, stable=True)


def make(path: Path, tokens: Tensor, *, layers: int, experts: int, top_k: int) -> None:
    """Record over ``tokens`` [N, T], stretch, and write ``{"tokens": [N, T], "routes": [layers, N * T, k]}``."""
    ranking = record(tokens)
    routes = stretch(ranking, tokens.reshape(-1), layers=layers, experts=experts, top_k=top_k)
    torch.save({"tokens": tokens, "routes": routes.to(torch.uint8)}, path)


class Routes:
    """A trace's routes [layers, T, k], layer by layer, position by position; after the last it begins again."""

    def __init__(self, routes: Tensor) -> None:
        self._routes = routes.long()
        # A single token's are ready: between two layers' weights every operation costs.
        self._single = [list(layer.split(1)) for layer in self._routes]
        self._position = [0] * len(routes)
        self.calls = 0

    def rewind(self) -> None:
        """From the first position again."""
        self._position = [0] * len(self._routes)

    def next(self, layer: int, index: Tensor) -> Tensor:
        """The next routes of a layer, in place of ``index`` [..., k]."""
        self.calls += 1
        start, length = self._position[layer], self._routes.shape[1]
        if index.shape[0] == 1 and index.dim() == 2 and index.dtype == torch.int64:
            self._position[layer] = start + 1
            return self._single[layer][start % length]
        flat = index.reshape(-1, index.shape[-1])
        self._position[layer] = start + len(flat)
        if start + len(flat) <= length:
            taken = self._routes[layer, start : start + len(flat)]
        else:
            rows = torch.arange(start, start + len(flat)) % length
            taken = self._routes[layer, rows]
        return taken.view(index.shape).to(index)


class Replay(Routes):
    """An experts function that takes its routes from a trace.

    Args:
        function: what computes: ``(module, hidden, index, weights) -> output``.
        routes: as of ``Routes``.
        layer_of: the trace's layer of an experts module.
    """

    def __init__(
        self, function: Callable[..., Tensor], routes: Tensor, layer_of: Callable[[nn.Module], int]
    ) -> None:
        super().__init__(routes)
        self._function = function
        self._layer_of = layer_of

    def __call__(
        self, module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        index = self.next(self._layer_of(module), top_k_index)
        return self._function(module, hidden_states, index, top_k_weights)


def text_tokens(which: str, count: int, length: int) -> Tensor:
    """[count, length] tokens of the bundled ``calibration`` or ``heldout`` text, from its beginning."""
    from transformers import AutoTokenizer

    from conmoe_edge.compress.stream.calibration_text import bundled_text

    text = bundled_text()
    documents: Sequence[Any] = text.train if which == "calibration" else (text.held_out or ())
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document.text).input_ids
        if len(tokens) >= count * length:
            return torch.tensor(tokens[: count * length]).view(count, length)
    raise ValueError(f"the {which} text has only {len(tokens)} tokens")


def main() -> None:
    """Command line: the shape is that of ``config.json`` in ``--model``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", choices=("calibration", "heldout"), required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    part = args.out.with_suffix(".part")
    make(
        part,
        text_tokens(args.text, args.sequences, SEQUENCE),
        layers=config["num_hidden_layers"],
        experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
    )
    part.rename(args.out)


if __name__ == "__main__":
    main()
