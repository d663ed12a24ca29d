"""Rounding in which every column makes up for what the columns before it lost (GPTQ).

W [R, K] (rows are outputs) is to be rounded so that (W - Q) H (W - Q)^T is least, H [K, K] being the Gram matrix of the
inputs that W is multiplied with. Columns are rounded one after another; what one loses is made up for by those that are
left, in the way that costs least under H. With H = V V^T, V upper triangular, a row loses |(w - q) V|^2, and place j of
(w - q) V has columns up to j only: it is least for what is rounded already where column j is not rounded as w_j but as

    w_j + sum over i < j of (w_i - q_i) V_ij / V_jj.

So no inverse is taken, and what is added is one product a group of columns. Columns that much comes in by go first,
while many are left: the groups in that order, and the columns of each. The order is not stored. Source: Frantar et al.,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2023), sections 3.1 to 3.3, whose U
is V^-1; in this form it is Babai's nearest plane.

Many matrices of one shape go at once. Cost: R K^2 / 2 multiply-adds a matrix, and K^3 / 3 for V. Peak memory: four
copies of the matrices in fp32, three of H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from conmoe_edge.compress.solvers.neuron_pruning import among

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: as GPTQ has it."""
COMMON = 0.05
"""Of the mean H of a layer's experts, added to each: experts with few tokens have Gram matrices of low rank."""


_FAR, _BLOCK = 256, 64
"""Most columns that are rounded between two products with all before them, and with those of the last such product."""
_NO_STEP = 1e20
"""In place of a step of 0."""


class Grid(Protocol):
    """Where weights may lie: ``step l + zero`` with l in low, low + 1, ..., low + top."""

    group: int
    """Columns that have a step and a zero of their own; K is a multiple of it."""
    low: float
    top: int

    def fit(self, columns: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero [E, 1, R] for a group, asked for when it is reached.

        ``columns`` [E, group, R] are its columns as they are by then, in any order, ``counts`` [E, group, 1] how much
        an error in each of them counts.
        """
        ...


@dataclass(frozen=True, slots=True)
class Rounded:
    """Attributes:
    codes: uint8 [E, K, R], the number l - low of every weight.
    groups: int64 [E, G], the group that was reached first, second, ...
    """

    codes: Tensor
    groups: Tensor


class Inputs:
    """What some matrices are multiplied with: their H fp32 [E, K, K], positive definite (``damped``), not changed.

    What is found of it is kept: matrices of the same inputs, and one matrix in several forms, have it once.
    """

    def __init__(self, moments: Tensor) -> None:
        self._moments = moments
        self._found: dict[int, _Factor] = {}

    def factored(self, group: int) -> _Factor:
        """For columns whose scales are ``group`` together."""
        if group not in self._found:
            order, groups = _order(self._moments.diagonal(dim1=1, dim2=2), group)
            self._found[group] = _Factor(order, groups, *_factored(self._moments, order))
        return self._found[group]


@dataclass(frozen=True, slots=True)
class _Factor:
    """``order`` and ``groups`` of ``_order``, ``share`` and ``counts`` of ``_factored``."""

    order: Tensor
    groups: Tensor
    share: Tensor
    counts: Tensor


def damped(moments: Tensor, common: Tensor | None = None) -> Tensor:
    """H [E, K, K] that can be factored: ``moments`` with a share of ``common`` [K, K] or [E, K, K], where there is one,
    and of the means of their diagonals.
    """
    found = moments.clone() if common is None else moments + COMMON * common
    mean = found.diagonal(dim1=1, dim2=2).mean(1)
    # Where nothing ever came in, every rounding is as good: any positive number will do.
    ridge = torch.where(mean > 0, DAMPING * mean, 1.0)
    found.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    return found


def round_with_feedback(weight: Tensor, inputs: Inputs, grid: Grid) -> Rounded:
    """``weight`` [E, R, K] rounded.

    Args:
        weight: fp32. Not changed.
        inputs: of each matrix.
        grid: where the rounded weights may lie; asked for every group in turn.
    """
    matrices, rows, count = weight.shape
    factor = inputs.factored(grid.group)
    order, share, counts = factor.order, factor.share, factor.counts
    columns = weight.new_empty(matrices, count, rows)  # a column is one run of numbers
    for one, at, own in zip(weight, order, columns, strict=True):
        own.copy_(one.index_select(1, at).T)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    lost = torch.empty_like(columns)  # w - q
    block = min(grid.group, _BLOCK)
    line = _Line.none()
    for first in range(0, count, _FAR):
        last = min(first + _FAR, count)
        near = columns[:, first:last]
        if first:
            near = torch.baddbmm(near, share[:, :first, first:last].mT, lost[:, :first])
        for start in range(first, last, block):
            stop = min(start + block, last)
            here = near[:, start - first : stop - first]
            if start > first:
                inside = share[:, first:start, start:stop].mT
                here = torch.baddbmm(here, inside, lost[:, first:start])
            if start % grid.group == 0:
                line = _Line.of(grid, here, counts[:, start:stop])
            own = slice(start, stop)
            line.round(columns[:, own], here, share[:, own, own], codes[:, own], lost[:, own])
    found = torch.empty_like(codes)
    for one, at, own in zip(codes, order, found, strict=True):
        own.index_copy_(0, at, one)
    return Rounded(found, factor.groups)


@dataclass(frozen=True, slots=True)
class _Line:
    """Where the columns of one group may lie, counted in steps: weight = ``base + unit u``, and u is rounded to a
    number in 0..``top``. Each [E, 1, R].

    Where a step is 0, so that every number gives the same weight, ``unit`` is so large that u is rounded to 0 and
    holds all that is lost.
    """

    top: int
    base: Tensor
    unit: Tensor

    @classmethod
    def none(cls) -> _Line:
        return cls(0, torch.empty(0), torch.empty(0))

    @classmethod
    def of(cls, grid: Grid, columns: Tensor, counts: Tensor) -> _Line:
        """As the grid has it for a group that is reached."""
        step, zero = grid.fit(columns, counts)
        return cls(grid.top, zero + grid.low * step, torch.where(step != 0, step, _NO_STEP))

    def round(
        self, weights: Tensor, moved: Tensor, share: Tensor, codes: Tensor, lost: Tensor
    ) -> None:
        """Some columns of the group, one after another.

        Args:
            weights: [E, b, R] as they were.
            moved: [E, b, R] with what columns before these have lost.
            share: [E, b, b], what each gets of the errors of those before it.
            codes, lost: [E, b, R], filled.
        """
        inverse = 1.0 / self.unit
        shift = -self.base * inverse
        wanted = torch.addcmul(shift, moved, inverse)
        own = torch.addcmul(shift, weights, inverse)
        numbers, left = torch.empty_like(own), torch.empty_like(own)
        for c in range(own.shape[1]):
            number, column = numbers[:, c : c + 1], wanted[:, c : c + 1]
            if c:
                inside = share[:, :c, c : c + 1].mT
                torch.baddbmm(column, inside, left[:, :c], out=number).round_().clamp_(0, self.top)
            else:
                torch.round(column, out=number).clamp_(0, self.top)
            torch.sub(own[:, c : c + 1], number, out=left[:, c : c + 1])
        codes.copy_(numbers)
        torch.mul(left, self.unit, out=lost)


def _order(diagonal: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int64 [E, K], the columns in the order in which they are rounded, and [E, G], the groups; the first where they
    tie.
    """
    grouped = diagonal.unflatten(1, (-1, group))
    groups = grouped.sum(2).argsort(dim=1, descending=True, stable=True)
    inside = grouped.argsort(dim=2, descending=True, stable=True)
    inside = inside.gather(1, groups.unsqueeze(2).expand_as(inside))
    return (groups.unsqueeze(2) * group + inside).flatten(1), groups


def _factored(moments: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """For the columns in ``order``: fp32 [E, K, K], strictly upper, what column j gets of the error of column i,
    V_ij / V_jj; and [E, K, 1], V_jj^2, what an error of column j costs when all columns behind it make up for it.
    """
    behind = order.flip(1)  # of lower triangles from behind
    turned = [among(one, at) for one, at in zip(moments, behind, strict=True)]
    upper = _cholesky(torch.stack(turned)).flip(1, 2)
    diagonal = upper.diagonal(dim1=1, dim2=2).clone()
    upper.div_(diagonal.unsqueeze(1))
    upper.diagonal(dim1=1, dim2=2).zero_()
    return upper, diagonal.square_().unsqueeze(2)


def _cholesky(moments: Tensor) -> Tensor:
    """Lower factors [E, K, K] in fp32; of what fp32 is not enough for, by way of fp64."""
    found, info = torch.linalg.cholesky_ex(moments)
    for place in info.nonzero().flatten().tolist():
        found[place] = torch.linalg.cholesky(moments[place].double()).float()
    return found
