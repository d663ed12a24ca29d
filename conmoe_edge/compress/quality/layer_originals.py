"""What the experts of every layer were, for the package to say beside what became of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from conmoe_edge.checkpoint.format.manifest import LayerOriginal
from conmoe_edge.model.anatomy import ModelAnatomy

_DIGITS = 3


def originals_of(anatomy: ModelAnatomy, worth: Mapping[str, float]) -> dict[int, LayerOriginal]:
    """MoE layer -> its experts as they were; ``worth`` is what the survey measured, if there was one."""
    return {
        layer.index: LayerOriginal(
            layer.experts.width,
            layer.experts.expert_numel,
            layer.experts.expert_bytes,
            _rounded(worth.get(str(layer.index))),
        )
        for layer in anatomy.layers
        if layer.experts is not None
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{max(0.0, value):.{_DIGITS}g}")
