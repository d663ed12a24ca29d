"""M-SMoE (arXiv 2310.01334, section 3): experts merged into the ones that are used most.

1. The K experts of a layer with the most calibration tokens are dominant; each of the others joins
   the one whose router logits are most like its own (``solvers/grouping.py``).
2. The neurons of every expert are brought into the order of the layer's expert 0 (``solvers/merge.py``).
3. A group becomes the mean of its experts, weighted by their tokens (``solvers/merge.py``). Its slots all lead
   there; the router stays, so that their gates add up.

As published but for this: every layer keeps the same number of experts, where the authors' code
lets one threshold on the usage of all layers decide; with a gate its rows belong to the neurons
that are matched; a group that no token came to is averaged with equal weights.
docs/methods-m-smoe.md says more.

Peak memory: the logits in fp64, and three experts in fp32 (one in fp64) while a group is merged.
"""

from __future__ import annotations

from conmoe_edge.compress.methods.grouped import grouped
from conmoe_edge.compress.methods.interface import (
    Decision,
    Method,
    Needs,
    Parts,
    ScopeView,
    identity,
)
from conmoe_edge.compress.solvers.grouping import Groups, around_dominant, router_likeness
from conmoe_edge.compress.solvers.merge import aligned, weighted_mean


def decide(scope: ScopeView, keep: int) -> Decision:
    """``keep`` merged experts for one layer."""
    return identity(scope) if keep >= len(scope.pool) else merged(scope, groups_of(scope, keep))


def groups_of(scope: ScopeView, keep: int) -> Groups:
    """The groups of one layer; every expert alone where all are kept."""
    (layer,) = scope.layers
    experts = tuple(range(layer.experts))
    if keep >= layer.experts:
        return Groups(experts, experts)
    tokens = layer.tokens
    assert tokens is not None and tokens.logits is not None, "M-SMoE needs the router's logits"
    return around_dominant(layer.statistics.counts, router_likeness(tokens.logits), keep)


def merged(scope: ScopeView, groups: Groups) -> Decision:
    """Every group as the mean of its aligned experts, computed when asked for."""
    (layer,) = scope.layers
    usage = layer.statistics.counts
    reference = scope.weights.parts(scope.pool[0])

    def merge(members: tuple[int, ...]) -> Parts:
        parts = (scope.weights.parts(scope.pool[one]) for one in members)
        return weighted_mean(
            (aligned(scope.module, reference, one) for one in parts),
            [usage[one] for one in members],
        )

    unused = sum(not any(usage[one] for one in groups.members(core)) for core in groups.cores)
    note = (
        f"Layer {layer.layer}: no calibration token came to {unused} of the groups; "
        "their experts are averaged equally."
    )
    return grouped(scope, groups, merge, (note,) if unused else ())


M_SMOE = Method(
    "m-smoe",
    "M-SMoE",
    "arXiv 2310.01334",
    decide,
    Needs(tokens=True, logits=True),
    within_layers=True,
)
