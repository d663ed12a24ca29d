"""The 4 bits that other tools have rounded weights to, found again in the weights.

A group of columns lies on ``scale * (number - zero point)``, numbers 0..15, the product rounded to the format of the
scales (``forms.Grid``), and perhaps to another one after that. ``round_to`` finds scale, zero point and numbers that
give every weight of a group again, bit for bit, where there are such; the source's own may be others that mean the
same. So an expert needs nothing but its weights to be stored as it was published, also after rows of it were taken, or
whole groups of columns. Groups that lie on no grid are rounded to the nearest, scale and zero point by least squares.

How they are found: the weight nearest to 0 is mostly one step, so the scale itself. Where that does not give the group
again, it may be two steps, three, ...; the scale is then one of those with which every number rounds to its weight.

Peak memory: a few times the block of rows that is given, in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import Grid

_MIDDLE = 8
"""The zero point where groups have none of their own."""
_MOST = 15
"""The largest number, and the most steps between a weight and 0 that tools make."""
_FURTHEST = 240
"""Zero points that a fit may have: bf16 holds whole numbers up to 256."""
_SHRINK = 0.96
"""The first guess of a group's range, as a share of the widest: outliers are clipped a little, all else is finer."""
_ASIDE = (0, 1, -1, 2, -2, 3, -3)
"""How many numbers beside the middle a scale is looked for, where weights were rounded to a coarser format than it."""
_BITS = {2: torch.int16, 4: torch.int32}


class _Groups(NamedTuple):
    """Of n groups: numbers fp32 [n, g], scales and zero points fp32 [n, 1]."""

    numbers: Tensor
    scale: Tensor
    zero: Tensor

    def put(self, places: Tensor, found: _Groups) -> None:
        """Take over ``found`` for the groups ``places``."""
        for mine, other in zip(self, found, strict=True):
            mine[places] = other


def round_to(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Numbers uint8 [r, K] and scales [G, r * (1 or 2)] of ``weight`` [r, K], all of it in one of torch's formats."""
    rows = weight.shape[0]
    groups = weight.contiguous().view(-1, grid.group)
    dtype = getattr(torch, grid.dtype)
    every = torch.arange(len(groups), device=groups.device)
    left = every
    if groups.dtype == torch.float32:  # what a product was rounded to holds it
        left = every[(groups.to(dtype).float() == groups).all(1)]
    best = _fitted(groups.float(), dtype, grid.zeros)
    asides = (0,) if torch.finfo(groups.dtype).eps <= torch.finfo(dtype).eps else _ASIDE
    for steps in range(1, _MOST + 1):
        if not len(left) or (steps == 2 and len(left) == len(every)):
            break  # nothing is left, or these weights are on no grid at all
        for aside in asides:
            found, right = _on_grid(groups[left], steps, aside, dtype, grid.zeros)
            best.put(left[right], _Groups(*(one[right] for one in found)))
            left = left[~right]
    pairs = [best.scale, best.zero] if grid.zeros else [best.scale]
    scales = torch.cat(pairs, 1).to(dtype).view(rows, -1, len(pairs)).transpose(0, 1)
    return best.numbers.to(torch.uint8).view(rows, -1), scales.flatten(1)


def expand(numbers: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """fp32 [r, K] of numbers uint8 [r, K] and scales [G, r * (1 or 2)]."""
    rows = numbers.shape[0]
    pairs = scales.view(len(scales), rows, -1).transpose(0, 1).float()  # [r, G, 1 or 2]
    wide = numbers.float().unflatten(1, (-1, grid.group))
    wide -= pairs[..., 1:] if grid.zeros else _MIDDLE
    return wide.mul_(pairs[..., :1]).to(scales.dtype).float().flatten(1)


def rows_of(scales: Tensor, rows: slice, count: int) -> Tensor:
    """The scales of a run of the ``count`` rows."""
    return scales.view(len(scales), count, -1)[:, rows].flatten(1)


def _on_grid(
    groups: Tensor, steps: int, aside: int, dtype: torch.dtype, zeros: bool
) -> tuple[_Groups, Tensor]:
    """``groups`` [n, g], if the weight of each that is nearest to 0 (and is not 0) is so many steps, and the scale is
    ``aside`` the middle of those that there may be; and which of them this gives again.
    """
    wide = groups.float()
    size = wide.abs()
    least = torch.where(size > 0, size, torch.inf).amin(1, keepdim=True)
    least = torch.where(least.isfinite(), least, 0.0)
    scale = least / steps
    number = torch.where(scale > 0, wide / scale, 0.0).round_()
    if steps > 1 or groups.dtype != dtype:
        scale = _between(size, number.abs(), groups.dtype, dtype).to(dtype)
        bits = _BITS[scale.element_size()]
        scale = (scale.view(bits) + aside).clamp_(min=0).view(dtype).float()
    # A zero has the sign of the scale; without zero points there are eight steps on one side, and seven on the other.
    turned = ((wide == 0) & wide.signbit()).any(1, keepdim=True)
    if not zeros:
        turned |= number.amax(1, keepdim=True) >= _MIDDLE
    number, scale = torch.where(turned, -number, number), torch.where(turned, -scale, scale)
    number += 0.0  # which makes -0 of a quotient 0
    low, high = number.amin(1, keepdim=True), number.amax(1, keepdim=True)
    zero = torch.full_like(scale, _MIDDLE)
    if zeros:
        zero = torch.maximum(torch.minimum(_MOST - high, zero), -low)
    inside = (low + zero >= 0) & (high + zero <= _MOST)
    given = (number * scale).to(dtype).to(groups.dtype)
    bits = _BITS[groups.element_size()]
    same = (given.view(bits) == groups.view(bits)).all(1)
    return _Groups((number + zero).clamp_(0, _MOST), scale, zero), same & inside.squeeze(1)


def _between(size: Tensor, number: Tensor, own: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The middle of the scales [n, 1] with which every number, times the scale, rounds to its weight."""
    half = torch.maximum(_to_next(size, own), _to_next(size, dtype)) / 2
    some = number > 0
    least = torch.where(some, (size - half) / number, 0.0).amax(1, keepdim=True)
    most = torch.where(some, (size + half) / number, torch.inf).amin(1, keepdim=True)
    return torch.where(most.isfinite(), (least + most) / 2, 0.0)


def _to_next(size: Tensor, dtype: torch.dtype) -> Tensor:
    """How far it is to the next number of a format, for numbers that are not negative."""
    near = size.to(dtype)
    after = (near.view(_BITS[near.element_size()]) + 1).view(dtype)
    return (after.float() - near.float()).nan_to_num_(0.0, 0.0)


def _fitted(wide: Tensor, dtype: torch.dtype, zeros: bool) -> _Groups:
    """Any weights fp32 [n, g], to the nearest."""
    low, high = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    if zeros:
        furthest = torch.maximum(high.abs(), low.abs())
        step = torch.maximum((high - low) * (_SHRINK / _MOST), furthest / _FURTHEST)
        zero = _number(-(high + low) / 2, step).add_(_MOST / 2).round_()
        zero = zero.clamp_(-_FURTHEST, _FURTHEST)
    else:  # the far end is eight steps away
        step = torch.where(high > -low, high, low) * (-_SHRINK / _MIDDLE)
        zero = torch.full_like(step, _MIDDLE)
    step = step.to(dtype).float()
    number = (_number(wide, step) + zero).round_().clamp_(0, _MOST)
    apart = number - zero
    spread = apart.square().sum(1, keepdim=True)
    step = torch.where(spread > 0, (apart * wide).sum(1, keepdim=True) / spread, step)
    step = step.to(dtype).float()
    return _Groups((_number(wide, step) + zero).round_().clamp_(0, _MOST), step, zero)


def _number(wide: Tensor, step: Tensor) -> Tensor:
    return torch.where(step != 0, wide / torch.where(step != 0, step, 1.0), 0.0)
