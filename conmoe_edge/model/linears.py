"""Which weights outside the routed experts may be stored in fewer bits: those of linear layers.

Embeddings, norms and routers keep the checkpoint's numbers: they are small, or steer everything behind them, or (an
embedding) are looked up and not multiplied. A head that is tied to the embedding stays with it. Works on the meta
model; nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from conmoe_edge.model.experts import Decoder, find_decoder, part_names

LEAST_SIDE = 16
"""Rows and columns from which on a matrix is worth a scale for each of its rows."""


class Shape(NamedTuple):
    """Outputs and inputs of a linear layer."""

    rows: int
    columns: int


def quantisable_weights(
    model: PreTrainedModel,
    targets: Mapping[str, str] | None = None,
    decoder: Decoder | None = None,
) -> dict[str, Shape]:
    """Checkpoint name -> shape, sorted by name.

    Only weights that go into a parameter of their own name count: where transformers renames or fuses on the way, a
    scale of its own name would not follow.

    Args:
        model: a causal LM before its experts were taken out; may be on the meta device.
        targets: checkpoint tensor -> parameter, as ``bridge.targets_of`` has it; by default every parameter's own name.
        decoder: of the model, where the caller has found it already.
    """
    own = None if targets is None else _under_own_name(targets)
    return {
        name: Shape(linear.out_features, linear.in_features)
        for name, linear in sorted(_linears(model, decoder or find_decoder(model)))
        if own is None or name in own
    }


def _under_own_name(targets: Mapping[str, str]) -> set[str]:
    counts: dict[str, int] = {}
    for target in targets.values():
        counts[target] = counts.get(target, 0) + 1
    return {key for key, target in targets.items() if key == target and counts[target] == 1}


def _linears(model: PreTrainedModel, decoder: Decoder | None) -> Iterable[tuple[str, nn.Linear]]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {*tied.keys(), *tied.values()}
    prefix, experts = ("", {}) if decoder is None else (decoder.prefix, decoder.experts)
    inside = tuple(f"{path}." for path, _ in experts.values())
    router_rows = {
        f"{prefix}.{layer}.": getattr(module, part_names(module)[0]).shape[0]
        for layer, (_, module) in experts.items()
    }
    for path, module in model.named_modules():
        # A subclass may do more than multiply.
        if type(module) is not nn.Linear or path.startswith(inside) or f"{path}.weight" in shared:
            continue
        if min(module.out_features, module.in_features) < LEAST_SIDE:
            continue
        layer = next((start for start in router_rows if path.startswith(start)), "")
        # What has an output for every expert of its layer is taken for the router; a router that
        # shifts by a hair sends tokens elsewhere.
        if layer and module.out_features == router_rows[layer]:
            continue
        yield f"{path}.weight", module
