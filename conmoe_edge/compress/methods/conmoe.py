"""ConMoE as published (arXiv 2605.29350, section 3): score, top-K over the whole scope, nearest prototype.

No weight is changed and no router is touched. With a scope of several layers the number of prototypes per layer follows
from the scores; a layer may keep few of its own experts.
"""

from __future__ import annotations

from conmoe_edge.checkpoint.format.manifest import SlotRecord
from conmoe_edge.compress.method_interface import Decision, Method, ScopeView, identity
from conmoe_edge.compress.methods.conmoe_reassign import nearest_prototype
from conmoe_edge.compress.methods.conmoe_score import prototype_score
from conmoe_edge.compress.solvers.select_experts import top_k
from conmoe_edge.compress.stats.statistics import LayerStatistics


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


CONMOE = Method("conmoe", "ConMoE", "arXiv 2605.29350", decide)
