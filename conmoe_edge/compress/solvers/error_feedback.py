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

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: as GPTQ has it."""
COMMON = 0.05
"""Of the mean H of a layer's experts, added to each: experts with few tokens have Gram matrices of low rank."""


_BLOCK = 64
"""Most columns that are rounded between two products with all before them."""


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


def round_with_feedback(weight: Tensor, moments: Tensor, grid: Grid) -> Rounded:
    """``weight`` [E, R, K] rounded.

    Args:
        weight: fp32. Not changed.
        moments: H fp32 [E, K, K], positive definite (``damped``). Not changed.
        grid: where the rounded weights may lie; asked for every group in turn.
    """
    matrices, rows, count = weight.shape
    order, groups = _order(moments.diagonal(dim1=1, dim2=2), grid.group)
    across = order.unsqueeze(2).expand(-1, -1, rows)
    columns = weight.mT.gather(1, across)  # [E, K, R]: a column is one run of numbers
    share, counts = _factored(_permuted(moments, order))
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    lost = torch.empty_like(columns)  # w - q
    step = zero = inverse = shift = base = torch.empty(0)
    block = min(grid.group, _BLOCK)
    number = columns.new_empty(matrices, block, rows)
    value = columns.new_empty(matrices, 1, rows)
    for start in range(0, count, block):
        stop = min(start + block, count)
        here = columns[:, start:stop]
        if start:
            here = torch.baddbmm(here, share[:, :start, start:stop].mT, lost[:, :start])
        if start % grid.group == 0:
            step, zero = grid.fit(here, counts[:, start:stop])
            inverse = torch.where(step != 0, 1.0 / step, 0.0)
            shift, base = -zero * inverse - grid.low, zero + grid.low * step
        for c in range(stop - start):
            column, place = here[:, c : c + 1], start + c
            if c:
                inside = share[:, start:place, place : place + 1].mT
                column = torch.baddbmm(column, inside, lost[:, start:place])
            one = number[:, c : c + 1]
            torch.addcmul(shift, column, inverse, out=one)
            one.round_().clamp_(0, grid.top)
            torch.addcmul(base, one, step, out=value)
            own = slice(place, place + 1)
            torch.sub(columns[:, own], value, out=lost[:, own])
        codes[:, start:stop] = number[:, : stop - start]
    return Rounded(torch.empty_like(codes).scatter_(1, across, codes), groups)


def _order(diagonal: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int64 [E, K], the columns in the order in which they are rounded, and [E, G], the groups; the first where they
    tie.
    """
    grouped = diagonal.unflatten(1, (-1, group))
    groups = grouped.sum(2).argsort(dim=1, descending=True, stable=True)
    inside = grouped.argsort(dim=2, descending=True, stable=True)
    inside = inside.gather(1, groups.unsqueeze(2).expand_as(inside))
    return (groups.unsqueeze(2) * group + inside).flatten(1), groups


def _permuted(square: Tensor, order: Tensor) -> Tensor:
    """Rows and columns ``order`` [E, K] of [E, K, K]."""
    rows = torch.stack([one.index_select(0, at) for one, at in zip(square, order, strict=True)])
    return rows.gather(2, order.unsqueeze(1).expand_as(rows))


def _factored(moments: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [E, K, K], strictly upper: what column j gets of the error of column i, V_ij / V_jj. And [E, K, 1]: V_jj^2,
    what an error of column j costs when all columns behind it make up for it.
    """
    upper = _cholesky(moments.flip(1, 2)).flip(1, 2)  # of lower triangles from behind
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
