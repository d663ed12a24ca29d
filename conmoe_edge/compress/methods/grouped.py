"""What the methods that merge experts have in common: groups of a pool to prototypes and slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.compress.methods.interface import Decision, Parts, ScopeView
from conmoe_edge.compress.solvers.grouping import Groups


def usage_of(scope: ScopeView) -> tuple[int, ...]:
    """Calibration tokens that chose each expert of the pool."""
    return tuple(count for layer in scope.layers for count in layer.statistics.counts)


def grouped(
    scope: ScopeView,
    groups: Groups,
    merge: Callable[[tuple[int, ...]], Parts],
    notes: Sequence[str] = (),
) -> Decision:
    """Every router slot of a group leads to one prototype, which has the name of the group's core.

    Args:
        scope: whose pool the numbers in ``groups`` refer to.
        groups: of experts by their place in the pool.
        merge: the weights of a group of at least two; an expert alone stays as it was, bit for bit.
        notes: for the decision.
    """
    places = {scope.pool[core]: core for core in groups.cores}

    def parts(prototype: ExpertId) -> Parts:
        members = groups.members(places[prototype])
        return scope.weights.parts(prototype) if len(members) == 1 else merge(members)

    return Decision(
        tuple(scope.pool[core] for core in groups.cores),
        tuple(SlotRecord(scope.pool[core]) for core in groups.core_of),
        parts=parts,
        notes=tuple(notes),
    )


def unused_note(scope: ScopeView, groups: Groups, usage: Sequence[int]) -> tuple[str, ...]:
    """A note on merged groups that no calibration token came to."""
    together = merged_groups(groups)
    unused = sum(not any(usage[one] for one in members) for members in together)
    if not unused:
        return ()
    return (
        f"{layers_of(scope)}: no calibration token came to {unused} of {len(together)} merged "
        "groups; their experts are averaged equally.",
    )


def merged_groups(groups: Groups) -> list[tuple[int, ...]]:
    """The members of every group of at least two."""
    return [members for core in groups.cores if len(members := groups.members(core)) > 1]


def forced_dtype(scope: ScopeView) -> torch.dtype:
    """In what to compute experts on tokens that no router sends them: fp16 may overflow there."""
    return torch.float32 if scope.dtype == torch.float16 else scope.dtype


def layers_of(scope: ScopeView) -> str:
    """``Layer 3`` or ``Layers 3 to 4``, for notes."""
    first, last = scope.layers[0].layer, scope.layers[-1].layer
    return f"Layer {first}" if first == last else f"Layers {first} to {last}"
