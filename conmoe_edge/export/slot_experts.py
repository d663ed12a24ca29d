"""A router slot as an expert of its own: its prototype's weights, scaled, widened, with its constant where it can be.

    scale * down(h) = (scale * W) h + scale * b,    a slot without prototype: W = 0,    constants go to b.

So a scale is folded into the down projection and its bias, and a constant can be kept where experts have such a bias;
nowhere else is there anything in an ordinary checkpoint that adds it. ``check_slots`` refuses what cannot be said
exactly, before anything is written. Peak memory of ``layer_experts``: the experts of one layer, and one prototype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.layout import neurons
from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest, SlotRecord
from conmoe_edge.checkpoint.package.prototype_reader import PrototypeReader
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.anatomy import narrowed_shape
from conmoe_edge.model.experts import part_names

_RUN = (
    "conmoe-edge chat DIR, conmoe-edge serve DIR and vLLM with the plugin run the package as it is"
)


def check_slots(manifest: Manifest, experts: Mapping[int, nn.Module]) -> None:
    """Refuse scales and constants that an ordinary expert of this model cannot have.

    Raises:
        UnsupportedModel: naming the layer.
    """
    for layer, row in sorted(manifest.slots.items()):
        module = experts[layer]
        biased = "down_proj_bias" in part_names(module)
        if any(slot.constant is not None for slot in row) and not biased:
            count = sum(slot.constant is not None for slot in row)
            raise UnsupportedModel(
                f"{count} router slots of layer {layer} add a constant, which a plain checkpoint cannot say.",
                "this model's experts have no bias at their output",
                f"conmoe-edge fit MODEL --for hf makes a package that exports; {_RUN}",
            )
        if any(slot.scale != 1.0 for slot in row) and module.has_post_expert_norm:
            raise UnsupportedModel(
                f"Router slots of layer {layer} scale a prototype, which a plain checkpoint cannot say.",
                "this model normalises what an expert gives, so a scale inside it is lost",
                f"conmoe-edge fit MODEL --for hf makes a package that exports; {_RUN}",
            )


def layer_experts(
    module: nn.Module,
    row: Sequence[SlotRecord],
    kept: Sequence[int],
    width: int,
    prototypes: PrototypeReader,
    constants: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The fused parameters of a layer with one expert for every slot of ``kept``.

    Args:
        module: the layer's experts module, on the meta device: shapes and layout.
        row: the records of all its router slots.
        kept: the slots that become experts, in their order.
        width: neurons of the experts to be; narrower prototypes are filled up with zeros.
        prototypes: the package's.
        constants: [n, H] fp32 of this layer.
        dtype: of the result.

    Returns:
        Parameter name -> [len(kept), ...].
    """
    transposed = bool(module.is_transposed)
    names = part_names(module)
    full = neurons(module.down_proj.shape, transposed)  # type: ignore[union-attr]
    fused = {
        name: torch.zeros(
            len(kept),
            *narrowed_shape(name, tuple(getattr(module, name).shape[1:]), transposed, full, width),
            dtype=dtype,
        )
        for name in names
    }
    places: dict[ExpertId, list[int]] = {}
    for place, slot in enumerate(kept):
        prototype = row[slot].prototype
        if prototype is not None:
            places.setdefault(prototype, []).append(place)
    for prototype, chosen in sorted(places.items()):
        parts = prototypes.parts(prototype, dtype, transposed=transposed)
        for place in chosen:
            scale = row[kept[place]].scale
            for name in names:
                part = parts[name]
                if scale != 1.0 and name.startswith("down_proj"):
                    part = part.float().mul(scale).to(dtype)
                _put(fused[name][place], part, bool(module.is_concatenated), name, transposed)
    for place, slot in enumerate(kept):
        constant = row[slot].constant
        if constant is not None:
            assert constants is not None
            bias = fused["down_proj_bias"][place]
            bias.copy_(bias.float() + constants[constant])
    return fused


def _put(target: Tensor, part: Tensor, concatenated: bool, name: str, transposed: bool) -> None:
    """Copy an expert's part into one with as many neurons or more, whose others are zero.

    Gate and up that stand one after the other each begin at their own half; interleaved ones go on where they end.
    """
    if target.shape == part.shape:
        target.copy_(part)
        return
    if name.startswith("gate_up_proj") and concatenated:
        axis = target.dim() - 1 if transposed else 0
        for half, source in zip(target.chunk(2, axis), part.chunk(2, axis), strict=True):
            _corner(half, source)
        return
    _corner(target, part)


def _corner(target: Tensor, part: Tensor) -> None:
    for axis, size in enumerate(part.shape):
        target = target.narrow(axis, 0, size)
    target.copy_(part)
