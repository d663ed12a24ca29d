"""Which line of evenly spaced numbers a group of weights is rounded to: looked for over shares of the group's range.

With numbers q = 0..top given to the weights of a group, the line that comes nearest to them is weighted least
squares, a closed form; with a line given, each weight takes the nearest number. So a range is tried, the weights take
their numbers, and the line is solved for those. Several shares of the widest range are tried: outliers are clipped, all
else is finer. Of the lines, as they are stored, the one with the least weighted squared error for those numbers is
taken, the first where they tie.

Groups are columns: rows of the matrix lie along the last axis, so that sums over a group are products with its weights.
Peak memory: four copies of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Snap = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Called with a step and a zero [..., 1, R] that are wanted: what is stored instead, the same two first and behind them
whatever else describes them.
"""


def best_line(
    group: Tensor, weights: Tensor, shares: Sequence[float], low: float, top: int, snap: Snap
) -> tuple[Tensor, ...]:
    """What ``snap`` gave for the best line ``step (q + low) + zero``.

    Args:
        group: fp32 [..., g, R].
        weights: [..., g, 1], not negative: how much an error in each column counts.
        shares: of the range, in the order in which they are tried.
        low: added to the numbers.
        top: the largest number.
        snap: what can be stored.
    """
    total = weights.sum(-2, keepdim=True)
    alike = torch.full_like(weights, 1.0 / weights.shape[-2])
    part = torch.where(total > 0, weights / total, alike).mT  # [..., 1, g], adds up to 1
    mean = part @ group
    apart = group - mean
    least, most = apart.amin(-2, keepdim=True), apart.amax(-2, keepdim=True)
    widest, middle = (most - least) / top, (most + least) / 2
    best: tuple[Tensor, ...] | None = None
    for share in shares:
        step = widest * share
        inverse = torch.where(step > 0, 1.0 / step, 0.0)
        numbers = torch.addcmul(top / 2 - middle * inverse, apart, inverse).round_().clamp_(0, top)
        first = part @ numbers
        together = part @ (numbers * apart)
        square = part @ numbers.square_()
        spread = square - first * first
        slope = torch.where(spread > 1e-6, together / spread, step)
        centre = first + low
        found = snap(slope, mean - slope * centre)
        step, off = found[0], found[1] - mean
        error = step * (step * (square + (2 * low) * first + low * low) - 2 * together)
        error += off * (2 * step * centre + off)
        if best is None:
            best = error, *found
        else:
            better = error < best[0]
            best = tuple(
                torch.where(better, one, other)
                for one, other in zip((error, *found), best, strict=True)
            )
    assert best is not None
    return best[1:]
