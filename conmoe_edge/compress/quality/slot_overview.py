"""The router slots as ``inspect`` shows them: how much went to each, and how far its prototype is from its expert.

Nothing at run time reads it. Distances are those of ``weight_distance.py`` on the pretrained weights, for the pairs of
the reassignment map, with every method: one more pass over the experts of a scope.

Peak memory: one matrix of two experts, and their difference in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import ExpertId, LayerOverview, SlotRecord
from conmoe_edge.compress.solvers.weight_distance import EPSILON, ExpertWeights
from conmoe_edge.compress.stats.statistics import LayerStatistics

_DIGITS = 6  # of a number for readers


def slot_distances(
    pool: Sequence[ExpertId], slots: Sequence[SlotRecord], weights: ExpertWeights
) -> dict[str, list[float | None]]:
    """Layer (as text, for the journal) -> distance of each of its slots to its prototype.

    Args:
        pool: all experts of a scope, in the order (layer, expert).
        slots: what each of them becomes.
        weights: of the pool, in its order.
    """
    position = {expert: number for number, expert in enumerate(pool)}
    found: dict[str, list[float | None]] = {}
    for number, (expert, slot) in enumerate(zip(pool, slots, strict=True)):
        distance = None
        if slot.prototype is not None:
            distance = _rounded(_distance(weights, number, position[slot.prototype]))
        found.setdefault(str(expert.layer), []).append(distance)
    return found


def overview_of(
    statistics: Mapping[int, LayerStatistics], distances: Mapping[str, Sequence[float | None]]
) -> dict[int, LayerOverview]:
    """Layer -> its overview. A run that an earlier version began has no ``distances`` of its first layers."""
    total = sum(sum(one.gates) for one in statistics.values()) or 1.0
    return {
        layer: LayerOverview(
            tuple(_rounded(gate / total) for gate in one.gates),
            one.counts,
            tuple(distances.get(str(layer)) or [None] * len(one.counts)),
        )
        for layer, one in statistics.items()
    }


def _distance(weights: ExpertWeights, one: int, other: int) -> float:
    """d(e, e') of ``weight_distance.py`` for one pair."""
    if one == other:
        return 0.0
    total = 0.0
    for name in weights.matrices():
        first, second = weights.read_one(name, one).float(), weights.read_one(name, other).float()
        total += 2 * _norm(first - second) / (_norm(first) + _norm(second) + 2 * EPSILON)
    return total / len(weights.matrices())


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
