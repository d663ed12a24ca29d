"""How much goes as experts and how much as neurons, where a method removes both.

A rate is the share of the routed experts' bytes that goes. A method that trims gives every prototype
as many neurons as they are worth, in steps of about a quarter of an expert's (``steps``), in the
bytes that removing experts alone would keep.

Where all prototypes must be alike (``alike``: another engine wants it, or the precision is mixed),
removing experts alone keeps a share q = 1 - rate of them, and a method that trims keeps

    width' / width  ~  count' / count  ~  sqrt(q),

both alike, which on the demo model lost least of the divisions that were tried (docs/auto.md).
Neurons come in steps that the kernels like, so that a narrow expert is still whole tiles of int4,
and never more bytes are kept than without trimming, counted in records of the precision that is
written. Where records are so small that their pages or their tiles eat up what trimming gives, a
width next to it is taken, or experts alone go. As prototypes are narrower, a token also reads less.

Arithmetic only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from conmoe_edge.checkpoint.format.forms import DOWN, LOW_GROUP, MX_BLOCK
from conmoe_edge.model.anatomy import ExpertsAnatomy, ModelAnatomy
from conmoe_edge.plan.levers import PRECISIONS, kept, record_bytes

PARTS = 4
"""Widths that a prototype may have, where they differ."""

_BLOCKS = {"mxfp4": MX_BLOCK, "q4": LOW_GROUP, "q3": LOW_GROUP, "q2": LOW_GROUP}
_STEPS = (64, 32, 16, 8, 4, 2, 1)
_FINEST = 8
"""A step is at most this part of the width."""
_DEAREST = 1.125
"""Bytes a neuron of a narrow record, of those of the whole one, at the most."""
_MOST_UNEVEN = 1 / 3
"""Share of the reduction, as a power of q, that either side gets at the least."""
_LEAST_NEURONS = 0.9
"""A division that keeps fewer neurons than this share of what removing experts alone keeps is none."""


def alike(precision: str, *, equal: bool) -> bool:
    """Whether all prototypes of a method that trims get the same number of neurons."""
    return equal or PRECISIONS[precision].mixed


def steps(experts: ExpertsAnatomy, precision: str) -> tuple[int, ...]:
    """The widths that prototypes may have, ascending, all neurons the last: about even parts of it.

    Only widths whose records are hardly dearer a neuron than whole ones: pages and tiles of int4 can
    make a narrow record as large as the whole.
    """
    width, kind = experts.width, PRECISIONS[precision].kinds[-1]
    step = _step(experts, kind)
    dear = record_bytes(experts, kind) / width * _DEAREST
    # Of widths whose records take the same pages, the widest.
    widest = {
        record_bytes(experts.narrowed(one), kind): one for one in range(step, width + 1, step)
    }
    fitting = [one for nbytes, one in widest.items() if nbytes <= dear * one and one < width]
    found = {
        min(fitting, key=lambda one: (abs(one - width * part / PARTS), one))
        for part in range(1, PARTS)
        if fitting
    }
    return (*sorted(found), width)


def _step(experts: ExpertsAnatomy, kind: str) -> int:
    """Neurons of a step; in MXFP4, in few bits and in 4 bits as published whole blocks, or all neurons where there are
    none.
    """
    width, block = experts.width, _BLOCKS.get(kind)
    if kind == "int4":
        grids = [part.grid for part in experts.parts if part.name == DOWN]
        block = grids[0].group if grids and grids[0] is not None else None
    if block:
        return block if width % block == 0 else width
    return next(size for size in _STEPS if size <= max(1, width // _FINEST) and width % size == 0)


def narrow_width(experts: ExpertsAnatomy, rate: float, precision: str) -> int:
    """Neurons that stay in every prototype."""
    width = experts.width
    if rate == 0.0:
        return width
    step = _step(experts, PRECISIONS[precision].kinds[-1])
    left = 1.0 - rate
    wanted = width * math.sqrt(left)
    widths = [
        one
        for one in range(step, width, step)
        if left ** (1 - _MOST_UNEVEN) <= one / width <= left**_MOST_UNEVEN
    ]
    enough = _LEAST_NEURONS * kept(experts.count, rate) * width
    for one in sorted(widths, key=lambda one: (abs(one - wanted), -one)):
        if one * _affordable(experts, experts.count, rate, one, precision) >= enough:
            return one
    return width


def narrowed(anatomy: ModelAnatomy, width: int) -> ModelAnatomy:
    """The anatomy with ``width`` neurons in every routed expert."""
    return replace(
        anatomy,
        layers=tuple(
            layer
            if layer.experts is None
            else replace(layer, experts=layer.experts.narrowed(width))
            for layer in anatomy.layers
        ),
    )


def trimmed(anatomy: ModelAnatomy, rate: float, precision: str) -> ModelAnatomy:
    """The anatomy with the experts as narrow as a method that trims leaves them."""
    return replace(
        anatomy,
        layers=tuple(
            layer
            if layer.experts is None
            else replace(
                layer,
                experts=layer.experts.narrowed(narrow_width(layer.experts, rate, precision)),
            )
            for layer in anatomy.layers
        ),
    )


def pool_kept(
    anatomy: ModelAnatomy, layers: Sequence[int], rate: float, precision: str, *, trims: bool
) -> int:
    """Prototypes that stay of the pool of these layers."""
    pool: list[ExpertsAnatomy] = []
    for index in layers:
        experts = anatomy.layers[index].experts
        assert experts is not None
        pool.append(experts)
    count = sum(experts.count for experts in pool)
    if not trims:
        return kept(count, rate)
    return _affordable(pool[0], count, rate, narrow_width(pool[0], rate, precision), precision)


def _affordable(
    experts: ExpertsAnatomy, count: int, rate: float, width: int, precision: str
) -> int:
    """Prototypes of ``width`` neurons, of a pool of ``count``, in the bytes that removing experts alone would keep."""
    kind = PRECISIONS[precision].kinds[-1]
    allowed = kept(count, rate) * record_bytes(experts, kind)
    return max(1, min(count, allowed // record_bytes(experts.narrowed(width), kind)))
