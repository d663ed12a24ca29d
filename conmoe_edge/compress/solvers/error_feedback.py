"""Rounding in which every column makes up for what the columns before it lost (GPTQ).

W [R, K] (rows are outputs) is to be rounded so that (W - Q) H (W - Q)^T is least, H [K, K] being the Gram matrix of the
inputs that W is multiplied with. Column after column is rounded; what that loses is taken from the columns that are
left, in the way that costs least under H: with U the upper Cholesky factor of H^-1, e = (w - q) / U_cc and every later
column j goes down by e U_cj. Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (2023), sections 3.1 to 3.3.

Many matrices of one shape go at once. Within a block of columns later columns follow at once, those behind it by one
product for the block. Cost: R K^2 multiply-adds a matrix, and K^3 for H. Peak memory: four copies of the matrices in
fp32, three of H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: as GPTQ has it."""
COMMON = 0.05
"""Of the mean H of all matrices, added to each: experts with few tokens have Gram matrices of low rank."""

RoundGroup = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]
"""Called with a group of columns [E, R, g], as they are by now, and the diagonal of H there [E, 1, g], when it is
reached; what it gives back rounds columns [E, R, n] of the group."""


def damped(moments: Tensor) -> Tensor:
    """H [E, K, K] that can be factored: ``moments`` with a share of their mean, and of their diagonals'."""
    found = moments + COMMON * moments.mean(0)
    mean = found.diagonal(dim1=1, dim2=2).mean(1)
    # Where nothing ever came in, every rounding is as good: any positive number will do.
    ridge = torch.where(mean > 0, DAMPING * mean, 1.0)
    found.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    return found


def round_with_feedback(
    weight: Tensor, moments: Tensor, group: int, round_group: RoundGroup
) -> Tensor:
    """``weight`` [E, R, K] rounded.

    Args:
        weight: fp32; K is a multiple of ``group``. Not changed.
        moments: H fp32 [E, K, K], positive definite (``damped``).
        group: columns that are rounded with one grid, found when they are reached.
        round_group: how.

    Returns:
        The rounded weights, fp32 [E, R, K].
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor = torch.linalg.cholesky(inverse, upper=True)  # [E, K, K]
    diagonal = moments.diagonal(dim1=1, dim2=2).unsqueeze(1)
    left, found = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[2], group):
        stop = start + group
        here = left[:, :, start:stop].clone()
        nearest = round_group(here, diagonal[:, :, start:stop])
        errors = torch.empty_like(here)
        for c in range(group):
            column = here[:, :, c : c + 1]
            rounded = nearest(column)
            own = factor[:, start + c, start + c].view(-1, 1, 1)
            errors[:, :, c : c + 1] = error = (column - rounded) / own
            found[:, :, start + c : start + c + 1] = rounded
            here[:, :, c + 1 :].baddbmm_(
                error, factor[:, start + c : start + c + 1, start + c + 1 : stop], alpha=-1.0
            )
        left[:, :, stop:].baddbmm_(errors, factor[:, start:stop, stop:], alpha=-1.0)
    return found
