"""M-SMoE (arXiv 2310.01334, section 3): experts merged into the ones that are used most.

1. The K experts of a layer with the most calibration tokens are dominant; each of the others joins
   the one whose router logits are most like its own (``grouping``).
2. The neurons of every expert are brought into the order of the layer's expert 0 (``align``).
3. A group becomes the mean of its experts, weighted by their tokens (``merge``). Its slots all lead
   there; the router stays, so that their gates add up.

As published but for this: every layer keeps the same number of experts, where the authors' code
lets one threshold on the usage of all layers decide; with a gate its rows belong to the neurons
that are matched; a group that no token came to is averaged with equal weights.
docs/methods-m-smoe.md says more.

Peak memory: the logits in fp64, and three experts in fp32 (one in fp64) while a group is merged.
"""

from __future__ import annotations

from collections.abc import Callable

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
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
    if keep >= len(scope.pool):
        return identity(scope)
    groups = groups_of(scope, keep)
    merge = merged(scope, groups)
    cores, slots, notes = described(scope, groups)
    return Decision(cores, slots, parts=merge, notes=notes)


def groups_of(scope: ScopeView, keep: int) -> Groups:
    """The groups of one layer; every expert alone where all are kept."""
    (layer,) = scope.layers
    experts = tuple(range(layer.experts))
    if keep >= layer.experts:
        return Groups(experts, experts)
    tokens = layer.tokens
    assert tokens is not None and tokens.logits is not None, "M-SMoE needs the router's logits"
    return around_dominant(layer.statistics.counts, router_likeness(tokens.logits), keep)


def merged(scope: ScopeView, groups: Groups) -> Callable[[ExpertId], Parts]:
    """The merged weights of a group by its core, computed when asked for. Alone, an expert is as it was."""
    (layer,) = scope.layers

    def merge(core: ExpertId) -> Parts:
        members = [scope.pool[one] for one in groups.members(scope.pool.index(core))]
        if len(members) == 1:
            return scope.weights.parts(core)
        reference = scope.weights.parts(scope.pool[0])
        return weighted_mean(
            (aligned(scope.module, reference, scope.weights.parts(one)) for one in members),
            [layer.statistics.counts[one.expert] for one in members],
        )

    return merge


def described(
    scope: ScopeView, groups: Groups
) -> tuple[tuple[ExpertId, ...], tuple[SlotRecord, ...], tuple[str, ...]]:
    """Groups as prototypes and slots, and a note where nobody used some of them."""
    (layer,) = scope.layers
    unused = sum(
        not any(layer.statistics.counts[one] for one in groups.members(core))
        for core in groups.cores
    )
    note = (
        f"Layer {layer.layer}: no calibration token came to {unused} of the groups; "
        "their experts are averaged equally."
    )
    return (
        tuple(scope.pool[core] for core in groups.cores),
        tuple(SlotRecord(scope.pool[core]) for core in groups.core_of),
        (note,) if unused else (),
    )


M_SMOE = Method(
    "m-smoe",
    "M-SMoE",
    "arXiv 2310.01334",
    decide,
    Needs(tokens=True, logits=True),
    within_layers=True,
)
