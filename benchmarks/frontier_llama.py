"""llama.cpp's side of the frontier: weights through its quantisers with an importance matrix.

The model is streamed layer by layer, for any architecture that ``fit`` takes; the loaded layer's weights are replaced
by what comes back from ``comparison/llama_round_trip.py``, which runs in the Python that has ``llama_cpp``. Loss and KL
come from the code of the receipt, on the sequences of ``eval``, so both sides are measured alike.

The importance matrix is llama.cpp's: for every expert and column the mean square of the input over the tokens that the
router sent there, of the original model, on the calibration text that ``fit --seed`` takes.

Peak memory: one decoder layer, its largest fused parameter three times in fp32, the hidden states of both texts.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conmoe_edge.compress.quality.receipt import compare_heads
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.expert_hooks import Tap, attach
from conmoe_edge.compress.stream.layer_stream import open_stream
from conmoe_edge.compress.stream.match_places import MatchPlaces
from conmoe_edge.compress.stream.streamed_model import open_subject
from conmoe_edge.compress.work.part_clock import Clock
from conmoe_edge.model.bridge import read_config
from conmoe_edge.model.experts import (
    expert_forward,
    inner_activations,
    is_experts_module,
    part_names,
    sum_dtype,
)

CPU = torch.device("cpu")
PROGRAM = Path(__file__).resolve().parent / "comparison" / "llama_round_trip.py"
DENSE_TYPE_ABOVE, FINE_DENSE, COARSE_DENSE, EDGES = 5.0, "Q8_0", "Q4_K", "Q6_K"
"""The whole file: attention, shared experts and dense layers in Q8_0 beside experts of at least 5 bits, else in Q4_K;
embeddings and head in Q6_K, llama.cpp's own choice for them."""
_SMALLEST = 32
"""Fewest rows and columns of a dense matrix that is quantised; smaller ones are gates."""

Change = Callable[[int | None, nn.Module], None]
"""Replaces weights of a loaded decoder layer, or with ``None`` those outside of the layers."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Weights of the original: all experts, dense matrices, embeddings and head, the rest; bytes of one as stored."""

    experts: int
    dense: int
    edges: int
    small: int
    width: int

    @property
    def all_weights(self) -> int:
        """Weights of the whole model."""
        return self.experts + self.dense + self.edges + self.small

    def whole(self, experts_bits: float, dense_bits: float | None, edges_bits: float | None) -> int:
        """Bytes of all weights; ``None`` is the checkpoint's own form."""
        own = 8 * self.width
        bits = self.experts * experts_bits + self.small * own
        bits += self.dense * (dense_bits or own) + self.edges * (edges_bits or own)
        return round(bits / 8)


class Importance(Tap):
    """A layer's own experts; adds up the squares of what gate/up and down get: [E, H] and [E, I], and counts [E]."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        self.counts = torch.zeros(0)

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]."""
        names = part_names(module)
        experts = getattr(module, names[0]).shape[0]
        out = torch.zeros(hidden.shape, dtype=sum_dtype(hidden))
        for expert in range(experts):
            rows, slots = (index == expert).nonzero(as_tuple=True)
            if not len(rows):
                continue
            parts = {name: getattr(module, name)[expert] for name in names}
            own = hidden[rows]
            real = slice(None) if self.keep is None else self.keep[rows]
            inner = inner_activations(module, own, parts)[real]
            self._add(names[0], experts, expert, own[real])
            self._add("down_proj", experts, expert, inner)
            if not len(self.counts):
                self.counts = torch.zeros(experts)
            self.counts[expert] += len(inner)
            value = expert_forward(module, own, parts)
            gates = weights[rows, slots].unsqueeze(-1)
            out.index_add_(0, rows, value.to(out.dtype) * gates.to(out.dtype))
        return out.to(hidden.dtype)

    def _add(self, name: str, experts: int, expert: int, values: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros(experts, values.shape[-1])
        self.sums[name][expert] += values.float().square().sum(0)

    def means(self) -> dict[str, Tensor]:
        """Parameter -> [E, C]; ones for an expert that no token reached."""
        seen = self.counts[:, None]
        return {
            name: torch.where(seen > 0, total / seen.clamp_min(1), torch.ones(()))
            for name, total in self.sums.items()
        }


def importance_of(model: Path, tokens: TokenSet) -> dict[str, np.ndarray]:
    """``layer.parameter`` -> [E, C] of the experts, or [1, C] of dense matrices."""
    found: dict[str, np.ndarray] = {}
    with torch.no_grad(), open_subject(model, CPU) as subject:
        subject.model.load_outside()
        stream = open_stream(subject.model, tokens)
        subject.model.drop_outside()
        for index in range(subject.layers):
            with subject.layer(index, Clock()) as layer, _dense_inputs(layer) as squares:
                tap = Importance()
                if index in subject.model.experts:
                    attach(subject.model.experts[index][1], tap)
                subject.advance(index, stream)
            for name, mean in tap.means().items():
                found[f"{index}.{name}"] = mean.numpy()
            for name, (total, count) in squares.items():
                found[f"{index}.{name}"] = (total / count)[None].numpy()
    return found


@contextmanager
def _dense_inputs(layer: nn.Module) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Matrix -> sum of squares of its input's columns, and rows. Padding counts as well: a few tokens of thousands."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            total, count = sums.get(name, (torch.zeros(rows.shape[-1]), 0))
            sums[name] = total + rows.square().sum(0), count + len(rows)

        return add

    hooks = [one.register_forward_pre_hook(hook(name)) for name, one in dense_matrices(layer)]
    yield sums
    for one in hooks:
        one.remove()


def dense_matrices(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of a decoder layer that are large enough to be quantised."""
    return [
        (name, one)
        for name, one in layer.named_modules()
        if isinstance(one, nn.Linear) and min(one.out_features, one.in_features) >= _SMALLEST
    ]


def _edges(model: nn.Module) -> list[tuple[str, Any]]:
    """Embeddings, and the head where it is a matrix of its own."""
    found: list[tuple[str, Any]] = [("embeddings", model.get_input_embeddings())]  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not found[0][1].weight:
        found.append(("head", head))
    return found


def sizes_of(model: Path) -> Sizes:
    """From the shapes alone."""
    width = torch.empty(0, dtype=_stored(model)).element_size()
    with open_subject(model, CPU) as subject:
        network = subject.model.model
        experts = {
            f"{path}.{name}": getattr(module, name).numel()
            for path, module in subject.model.experts.values()
            for name in part_names(module)
            if not name.endswith("_bias")
        }
        matrices = [one for layer in subject.model.layers for _, one in dense_matrices(layer)]
        dense = sum(one.weight.numel() for one in matrices)
        edges = sum(one.weight.numel() for _, one in _edges(network))
        everything = sum(one.numel() for one in network.parameters())
    total = sum(experts.values())
    return Sizes(total, dense, edges, everything - total - dense - edges, width)


def _stored(model: Path) -> torch.dtype:
    dtype = read_config(model).get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def hidden_of(model: Path, tokens: TokenSet, change: Change = lambda index, module: None) -> Tensor:
    """[N, T, H] behind the last layer, of a model whose loaded weights ``change`` may replace."""
    with torch.no_grad(), open_subject(model, CPU) as subject:
        subject.model.load_outside()
        change(None, subject.model.model)
        stream = open_stream(subject.model, tokens)
        subject.model.drop_outside()
        for index in range(subject.layers):
            with subject.layer(index, Clock()):
                change(index, subject.model.layers[index])
                subject.advance(index, stream)
    return stream.hidden


def measured(
    model: Path,
    tokens: TokenSet,
    before: Tensor,
    after: Tensor,
    change: Change,
    places: MatchPlaces,
) -> dict[str, Any]:
    """The receipt of hidden states ``after`` beside those of the original."""
    with (
        torch.no_grad(),
        open_subject(model, CPU) as original,
        open_subject(model, CPU) as other,
    ):
        original.model.load_outside()
        other.model.load_outside()
        change(None, other.model.model)
        return compare_heads(original.model, before, other.model, after, tokens, places)


class RoundTrips:
    """The program that quantises, kept running; one job at a time."""

    def __init__(self, python: str, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [python, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={}
        )

    def __call__(
        self, kind: str, weights: Tensor, importance: np.ndarray | None
    ) -> tuple[Tensor, float]:
        """[E, R, C] as they come back in fp32, and bits a weight.

        Raises:
            RuntimeError: llama.cpp or its Python package cannot do this type.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        paths = {
            name: str(self._folder / f"{name}.npy") for name in ("weights", "importance", "out")
        }
        np.save(paths["weights"], weights.float().contiguous().numpy())
        job: dict[str, Any] = {"type": kind, **paths}
        if importance is None:
            job["importance"] = None
        else:
            np.save(paths["importance"], importance.astype(np.float32))
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the program ended"}
        if "error" in answer:
            raise RuntimeError(f"llama.cpp, {kind}: {answer['error']}")
        return torch.from_numpy(np.load(paths["out"])), float(answer["bits"])

    def close(self) -> None:
        """End the program."""
        self._process.communicate()


@contextmanager
def round_trips(python: str) -> Iterator[RoundTrips]:
    """A running program, and a folder for its files."""
    with tempfile.TemporaryDirectory() as folder:
        program = RoundTrips(python, Path(folder))
        try:
            yield program
        finally:
            program.close()


class Quantised:
    """A ``Change``: experts in one type, and for the whole file the rest as well. ``bits`` are known after a run."""

    def __init__(
        self,
        trips: RoundTrips,
        kind: str,
        importance: Mapping[str, np.ndarray],
        dense: str | None = None,
    ) -> None:
        self._trips, self._kind, self._importance, self._dense = trips, kind, importance, dense
        self.bits: dict[str, float] = {}

    def __call__(self, index: int | None, module: nn.Module) -> None:
        """Replace the weights of a loaded layer, or of what is outside."""
        if index is None:
            if self._dense is not None:
                for _, one in _edges(module):
                    one.weight.data = self._changed(EDGES, "edges", one.weight.data[None], None)[0]
            return
        for one in module.modules():
            if is_experts_module(one):
                self._experts(index, one)
        if self._dense is not None:
            for name, one in dense_matrices(module):
                worth = self._importance.get(f"{index}.{name}")
                one.weight.data = self._changed(self._dense, "dense", one.weight.data[None], worth)[
                    0
                ]

    def _experts(self, index: int, experts: nn.Module) -> None:
        for name in part_names(experts):
            if name.endswith("_bias"):
                continue
            parameter = getattr(experts, name)
            turned = bool(experts.is_transposed)
            rows = parameter.data.mT if turned else parameter.data
            worth = self._importance[f"{index}.{name}"]
            back = self._changed(self._kind, "experts", rows, worth, torch.float32)
            parameter.data = back.mT.contiguous() if turned else back

    def _changed(
        self,
        kind: str,
        part: str,
        weights: Tensor,
        worth: np.ndarray | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        back, self.bits[part] = self._trips(kind, weights, worth)
        return back.to(dtype or weights.dtype)


def llama_arm(
    model: Path,
    tokens: TokenSet,
    before: Tensor,
    importance: Mapping[str, np.ndarray],
    trips: RoundTrips,
    kind: str,
    whole: bool,
    sizes: Sizes,
    places: MatchPlaces,
) -> dict[str, Any]:
    """One type: bytes, loss and KL. ``before`` are the original's hidden states on ``tokens``."""
    dense = None
    if whole:
        dense = FINE_DENSE if _bits(kind) >= DENSE_TYPE_ABOVE else COARSE_DENSE
    change = Quantised(trips, kind, importance, dense)
    after = hidden_of(model, tokens, change)
    receipt = measured(model, tokens, before, after, change, places)
    bits = change.bits
    return {
        "experts_bytes": round(sizes.experts * bits["experts"] / 8),
        "file_bytes": sizes.whole(bits["experts"], bits.get("dense"), bits.get("edges")),
        "dense": dense or "source",
        **receipt,
    }


def _bits(kind: str) -> float:
    digits = [letter for letter in kind if letter.isdigit()]
    return float(digits[0])
