"""How much goes as experts and how much as neurons, where a method removes both.

A rate is the share of the routed experts' bytes that goes. Removing experts alone keeps a share
1 - rate of them; a method that trims keeps

    width' / width  ~  count' / count  ~  sqrt(1 - rate),

both alike, which on the demo model lost least of the divisions that were tried (docs/auto.md),
and never more bytes than without trimming. Neurons come in steps that the kernels like, so that a
narrow expert is still whole tiles of int4. As every prototype is narrower, a token also reads less.

Arithmetic only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from conmoe_edge.model.anatomy import ExpertsAnatomy, ModelAnatomy
from conmoe_edge.plan.levers import kept

_STEPS = (64, 32, 16, 8, 4, 2, 1)
_FINEST = 8
"""A step is at most this part of the width."""


def narrow_width(width: int, rate: float) -> int:
    """Neurons that stay of ``width``."""
    if rate == 0.0:
        return width
    step = next(size for size in _STEPS if size <= max(1, width // _FINEST) and width % size == 0)
    wanted = round(width * math.sqrt(1.0 - rate) / step) * step
    return max(step, min(width, wanted))


def trimmed(anatomy: ModelAnatomy, rate: float) -> ModelAnatomy:
    """The anatomy with the experts as narrow as a method that trims leaves them."""
    return replace(
        anatomy,
        layers=tuple(
            layer
            if layer.experts is None
            else replace(
                layer, experts=layer.experts.narrowed(narrow_width(layer.experts.width, rate))
            )
            for layer in anatomy.layers
        ),
    )


def pool_kept(anatomy: ModelAnatomy, layers: Sequence[int], rate: float, trims: bool) -> int:
    """Prototypes that stay of the pool of these layers."""
    pool: list[ExpertsAnatomy] = []
    for index in layers:
        experts = anatomy.layers[index].experts
        assert experts is not None
        pool.append(experts)
    count = sum(experts.count for experts in pool)
    whole = kept(count, rate)
    if not trims:
        return whole
    width = pool[0].width
    return max(1, min(count, whole * width // narrow_width(width, rate)))
