"""Which matrices outside the routed experts may be stored in fewer bits: linear layers, and the table of embeddings.

Norms and routers keep the checkpoint's numbers: they are small, or steer everything behind them. A head that is tied to
the embedding is stored with it, once. Works on the meta model; nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from conmoe_edge.checkpoint.format.forms import DENSE_KINDS, Kind, dense_kind
from conmoe_edge.model.experts import Decoder, find_decoder, part_names

LEAST_SIDE = 16
"""Rows and columns from which on a matrix is worth a scale for each of its rows."""

IN_ROWS = (".kv_b_proj.weight",)
"""Ends of the names of matrices whose rows are added up as well as multiplied (compressed attention, ``latent.h``),
which tiles of rows do not allow."""


class Shape(NamedTuple):
    """A matrix: its outputs (or the rows that are looked up) and inputs, and what becomes of it.

    ``in_rows``: only forms whose rows lie one after another suit. ``looked_up``: a table of embeddings. ``at_an_end``:
    that, or the output head.
    """

    rows: int
    columns: int
    in_rows: bool = False
    looked_up: bool = False
    at_an_end: bool = False


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
    head = model.get_output_embeddings()
    found = {
        name: Shape(
            one.out_features, one.in_features, name.endswith(IN_ROWS), at_an_end=one is head
        )
        for name, one in _linears(model, decoder or find_decoder(model))
    }
    if (table := embeddings_of(model)) is not None:
        path, module = table
        found[f"{path}.weight"] = Shape(
            module.num_embeddings, module.embedding_dim, looked_up=True, at_an_end=True
        )
    return {name: shape for name, shape in sorted(found.items()) if own is None or name in own}


def dense_forms(shapes: Mapping[str, Shape], precision: str) -> dict[str, Kind]:
    """How each of ``quantisable_weights`` is stored in a ``precision`` other than ``source``."""
    wished = DENSE_KINDS[precision]
    return {
        name: dense_kind(
            one.rows, one.columns, wished, in_rows=one.in_rows, at_an_end=one.at_an_end
        )
        for name, one in shapes.items()
    }


def embeddings_of(model: PreTrainedModel) -> tuple[str, nn.Embedding] | None:
    """The table of embeddings and its path; ``None`` where it does more than look up, or shares its numbers with
    something else than the head.
    """
    module = model.get_input_embeddings()
    # A subclass may scale what it looks up, and ``max_norm`` changes the table.
    if type(module) is not nn.Embedding or module.max_norm is not None:
        return None
    if min(module.num_embeddings, module.embedding_dim) < LEAST_SIDE:
        return None
    path = next((path for path, one in model.named_modules() if one is module), None)
    if path is None:
        return None
    partners = _tied_to(model, f"{path}.weight")
    head = tied_head(model, path)
    return (path, module) if partners <= ({f"{head}.weight"} if head else set()) else None


def tied_head(model: PreTrainedModel, embeddings: str) -> str | None:
    """The path of a plain linear head that has its weight from the table at the path ``embeddings``."""
    partners, head = _tied_to(model, f"{embeddings}.weight"), model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is head and f"{path}.weight" in partners:
            return path if type(module) is nn.Linear else None
    return None


def _tied_to(model: PreTrainedModel, name: str) -> set[str]:
    """The other parameters that have their numbers from, or give them to, ``name``."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {one for pair in tied.items() if name in pair for one in pair} - {name}


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
