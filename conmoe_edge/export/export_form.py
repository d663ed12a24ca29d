"""What becomes of a package as a plain checkpoint: which router slots stay, how wide experts are, and what to say.

A package whose routers may not choose the slots that were removed, with equally many left in every layer, becomes a
smaller checkpoint: those slots go, from the experts and from the router. Every other package becomes one of the
model's own size, in which each slot has a copy of its prototype. Plain numbers only, apart from two probes of the
config on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from conmoe_edge.checkpoint.format.layout import expert_width, neurons
from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.export.config_fields import SizeChange, experts_field, set_field, width_field

_RUN = "conmoe-edge chat DIR and conmoe-edge serve DIR run the package as it is"


@dataclass(frozen=True, slots=True)
class Decided:
    """What will be written.

    Attributes:
        kind: ``pruned`` where router slots go, else ``materialised``.
        kept: decoder layer -> the router slots that become experts, ascending.
        slots: router slots of a layer before.
        width: neurons of the experts that are written.
        changes: config field -> its new value.
        sliced: tensors of the router -> the axis of its slots; empty where none go.
        config: the config of what is written.
        notes: plain sentences for the reader.
    """

    kind: str
    kept: Mapping[int, tuple[int, ...]]
    slots: int
    width: int
    changes: Mapping[str, int]
    sliced: Mapping[str, int]
    config: PretrainedConfig
    notes: tuple[str, ...]


def rerouted(manifest: Manifest) -> frozenset[int]:
    """Layers whose routers may not choose slots that have neither prototype nor constant."""
    return frozenset(getattr(manifest, "rerouted", ()))


def kept_slots(manifest: Manifest) -> dict[int, tuple[int, ...]]:
    """Decoder layer -> the router slots that may be chosen."""
    masked = rerouted(manifest)
    return {
        layer: tuple(
            place
            for place, slot in enumerate(row)
            if layer not in masked or slot.prototype is not None or slot.constant is not None
        )
        for layer, row in sorted(manifest.slots.items())
    }


def decide(
    manifest: Manifest,
    config: PretrainedConfig,
    experts: Mapping[int, nn.Module],
    kept: Mapping[int, tuple[int, ...]] | None = None,
) -> Decided:
    """Decide for a package.

    Args:
        manifest: the package's.
        config: the model's, without a quantization.
        experts: decoder layer -> its experts module on the meta device.
        kept: the router slots that stay; by default what the manifest says.

    Raises:
        UnsupportedModel: an ordinary checkpoint of this model cannot hold this.
    """
    kept = kept_slots(manifest) if kept is None else kept
    slots = len(next(iter(manifest.slots.values())))
    notes: list[str] = []
    changes: dict[str, int] = {}
    sliced: Mapping[str, int] = {}
    pruned = any(len(kept[layer]) != len(row) for layer, row in manifest.slots.items())
    if pruned:
        change, count = _fewer_experts(manifest, config, experts, kept, slots)
        changes[change.field], sliced = count, change.axes
        config = set_field(config, change.field, count)
        notes.append(
            f"A plain smaller checkpoint: {count} of {slots} experts in every layer, router rows to match."
        )
        if _gates_grow(config, sliced):
            notes.append(
                "This router does not renormalise: its softmax no longer counts the removed slots, so gates are "
                "larger than in the package and the logits differ."
            )
    elif not _own_experts(manifest):
        notes.append(
            f"Saves no memory: {len(manifest.prototypes)} prototypes are written as "
            f"{sum(map(len, kept.values()))} experts, because a plain checkpoint has one for every router slot."
        )
    module: Any = next(iter(experts.values()))
    transposed = bool(module.is_transposed)
    full = neurons(module.down_proj.shape, transposed)
    width = max((expert_width(layout, transposed) for layout in manifest.layouts), default=full)
    if width < full:
        narrow = width_field(config, full, width)
        if narrow is None:
            notes.append(
                f"Experts are written with {full} neurons, {full - width} of them zero: no field of this config "
                "gives the neurons of routed experts alone."
            )
            width = full
        else:
            changes[narrow.field] = width
            config = set_field(config, narrow.field, width)
            notes.append(f"Experts have {width} of {full} neurons ({narrow.field}).")
    wide = sorted(
        {layout.precision for layout in manifest.layouts}
        & {"int8", "int4", "mxfp4", "q4", "q3", "q2"}
    )
    if wide or manifest.dense_precision != "source":
        notes.append("Weights in 8 bits and less are written in the model's own number format.")
    kind = "pruned" if pruned else "materialised"
    return Decided(kind, dict(kept), slots, width, changes, dict(sliced), config, tuple(notes))


def _own_experts(manifest: Manifest) -> bool:
    """Whether every router slot has an expert of its own, so that no copies are written."""
    return all(
        slot.prototype is not None
        and (slot.prototype.layer, slot.prototype.expert) == (layer, place)
        for layer, row in manifest.slots.items()
        for place, slot in enumerate(row)
    )


def _fewer_experts(
    manifest: Manifest,
    config: PretrainedConfig,
    experts: Mapping[int, nn.Module],
    kept: Mapping[int, tuple[int, ...]],
    slots: int,
) -> tuple[SizeChange, int]:
    """The config field for the number of experts, and that number."""
    counts = {layer: len(places) for layer, places in kept.items()}
    if set(counts) != set(experts) or len(set(counts.values())) != 1:
        few = min(counts, key=lambda layer: (counts[layer], layer))
        many = max(counts, key=lambda layer: (counts[layer], -layer))
        raise UnsupportedModel(
            "The layers of this package have different numbers of experts.",
            f"layer {few} has {counts[few]}, layer {many} {counts[many]}; a plain checkpoint has one number for all",
            f"fit with --scope 1 and a method that keeps as many in every layer; {_RUN}",
        )
    count = next(iter(counts.values()))
    text = config.get_text_config()
    chosen = max(
        (int(v) for n in _TOP_K if isinstance(v := getattr(text, n, None), int)), default=1
    )
    if count < chosen:
        raise UnsupportedModel(
            f"{count} experts a layer are fewer than the {chosen} that a token chooses.",
            "",
            _RUN,
        )
    groups = max(
        (int(v) for n in _GROUPS if isinstance(v := getattr(text, n, None), int)), default=1
    )
    groups = max(1, groups)
    for layer, places in kept.items():
        members = [
            sum(place * groups // slots == group for place in places) for group in range(groups)
        ]
        if len(set(members)) != 1:
            raise UnsupportedModel(
                f"The groups of the router in layer {layer} have lost different numbers of slots.",
                f"it chooses among {groups} groups of equal size, which now have {members}",
                _RUN,
            )
    return experts_field(config, slots, count), count


_TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token")
_GROUPS = ("n_group", "num_expert_group", "num_expert_groups")


def _gates_grow(config: PretrainedConfig, sliced: Mapping[str, int]) -> bool:
    """Whether gates are shares of a softmax over all slots, with no renormalisation over the chosen ones after it."""
    text = config.get_text_config()
    sigmoid = getattr(text, "scoring_func", "softmax") != "softmax" or any(
        "correction_bias" in name for name in sliced
    )
    return getattr(text, "norm_topk_prob", True) is False and not sigmoid
