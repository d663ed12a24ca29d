"""Which experts stay, by a score. Pure; ties go to the lowest index, that is (layer, expert).

``top_k`` ranks a pool as one. ``survivors`` is for methods that remove experts: a scope of one layer keeps its best; in
a scope of several layers each keeps at least its floor, and the rest of the places go to the best of the pool. Scores
of different layers are compared as shares of their layer's sum, since outputs grow from layer to layer. Where a router
first chooses among groups of slots, all groups keep the same number, give or take one.

How many stay is the plan's arithmetic (``plan.levers.kept``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_k(score: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the ``count`` highest scores, ascending."""
    order = torch.argsort(score, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def survivors(
    scores: Sequence[Tensor], keep: int, floors: Sequence[int], groups: Sequence[int]
) -> tuple[int, ...]:
    """Positions in the pool of the experts that stay, ascending.

    Args:
        scores: of every layer [E], not negative.
        keep: how many stay of the whole pool, not less than the sum of ``floors``.
        floors: how many at least stay of each layer.
        groups: groups of each layer's router; 1 where it has none.
    """
    if sum(floors) > keep:
        raise ValueError(f"{keep} experts cannot be shared out where {sum(floors)} are needed")
    found: list[int] = []
    start = 0
    counts = _counts([score.double() for score in scores], keep, floors)
    for score, count, parts in zip(scores, counts, groups, strict=True):
        found += [start + position for position in best_of(score, count, parts)]
        start += len(score)
    return tuple(found)


def best_of(score: Tensor, count: int, groups: int) -> tuple[int, ...]:
    """The ``count`` best of one layer [E], evenly over ``groups`` runs of neighbours."""
    base, extra = divmod(count, groups)
    size = len(score) // groups
    found: list[int] = []
    following: list[int] = []  # the best of each group that is not among its base
    for start in range(0, size * groups, size):
        order = torch.argsort(score[start : start + size], descending=True, stable=True).tolist()
        found += [start + position for position in order[:base]]
        following += [start + position for position in order[base : base + 1]]
    if extra:
        found += [following[one] for one in top_k(score[following], extra)]
    return tuple(sorted(found))


def _counts(scores: Sequence[Tensor], keep: int, floors: Sequence[int]) -> list[int]:
    """How many stay of each layer."""
    if len(scores) == 1:
        return [keep]
    rest: list[Tensor] = []
    owner: list[int] = []
    for layer, (score, floor) in enumerate(zip(scores, floors, strict=True)):
        shares = score / score.sum().clamp(min=torch.finfo(torch.float64).tiny)
        left = torch.sort(shares, descending=True, stable=True).values[floor:]
        rest.append(left)
        owner += [layer] * len(left)
    counts = list(floors)
    for position in top_k(torch.cat(rest), keep - sum(floors)):
        counts[owner[position]] += 1
    return counts
