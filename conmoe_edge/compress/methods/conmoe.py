"""ConMoE as published (arXiv 2605.29350, section 3): score, top-K over the whole scope, nearest prototype.

    b_e = min over e' != e in the scope of d(e, e')             replaceability (3.2)
    x^  = (x - min x) / (max x - min x + eps)                   within the scope
    s_e = a^_e * b^_e                                           prototype score (3.2)
    P   = the K experts with the highest s                      selection (3.3)
    m(e) = argmin over p in P of d(e, p)                        reassignment (3.3); a prototype maps to itself

a_e is the contribution (``stats/statistics.py``), d the weight distance (``solvers/weight_distance.py``). No weight is
changed and no router is touched. With a scope of several layers the number of prototypes per layer follows from the
scores; a layer may keep few of its own experts. Ties go to the lowest (layer, expert).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import SlotRecord
from conmoe_edge.compress.methods.interface import Decision, Method, ScopeView, identity
from conmoe_edge.compress.solvers.ranking import top_k
from conmoe_edge.compress.stats.statistics import LayerStatistics

EPSILON = 1e-12


def decide(scope: ScopeView, keep: int) -> Decision:
    """Prototypes and reassignment map of one scope; ``keep`` prototypes remain."""
    if keep >= len(scope.pool):
        return identity(scope)
    distance = scope.distances()
    contribution = scope.over_pool(LayerStatistics.contribution)
    kept = top_k(prototype_score(contribution, distance), keep)
    mapping = nearest_prototype(distance, kept)
    return Decision(
        tuple(scope.pool[index] for index in kept),
        tuple(SlotRecord(scope.pool[index]) for index in mapping),
    )


def prototype_score(contribution: Tensor, distance: Tensor) -> Tensor:
    """[P]: s_e. contribution: [P] a_e over the whole scope; distance: [P, P]."""
    return min_max(contribution) * min_max(replaceability(distance))


def replaceability(distance: Tensor) -> Tensor:
    """[P]: b_e, the distance to the nearest other expert; 0 for the only expert of a scope. distance: [P, P]."""
    if distance.shape[0] == 1:
        return torch.zeros(1, dtype=distance.dtype)
    others = distance.clone()
    others.fill_diagonal_(float("inf"))
    return others.min(dim=1).values


def min_max(values: Tensor) -> Tensor:
    """[P] -> [P] in [0, 1]; all zero where the values are all equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low + EPSILON)


def nearest_prototype(distance: Tensor, prototypes: Sequence[int]) -> tuple[int, ...]:
    """m(e) of every expert of the pool. distance: [P, P]; prototypes: ascending indices."""
    columns = torch.tensor(list(prototypes))
    nearest = columns[distance[:, columns].argmin(dim=1)]  # argmin takes the first of equals
    nearest[columns] = columns
    return tuple(nearest.tolist())


CONMOE = Method("conmoe", "ConMoE", "arXiv 2605.29350", decide, keeps=True)
