"""How long the pieces of a decoded token take, layer by layer: what a decision about reading ahead needs to know.

The same rates and shares as ``plan/speed.py``, not added up: between two routers there is a time in which nothing is
asked of the disk. Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.dense_precision import read_by_kind
from conmoe_edge.plan.speed import (
    decode_bound,
    dense_share,
    kernel_share,
    planned_step,
    reach_of,
)


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds.

    Attributes:
        before: for every MoE layer, from the end of the experts before it (of the token before, for the first) to its
            router's choice.
        compute: one prototype of every record layout.
        read: one record of every layout, from the tier below.
        begin: that the computing thread is kept from computing by one read.
    """

    before: tuple[float, ...]
    compute: tuple[float, ...]
    read: tuple[float, ...]
    begin: float = 0.0


def pace(
    anatomy: ModelAnatomy,
    budget: Budget,
    records: Sequence[tuple[str, int]],
    offloaded_bytes: int,
) -> Pace | None:
    """The pace on the machine of ``budget``; ``None`` where a bandwidth that matters is unknown.

    Args:
        anatomy: with the dense bytes as they are stored.
        budget: the rates.
        records: ``(kind, bytes)`` of every record layout.
        offloaded_bytes: of the prototypes without a slot.
    """
    if not budget.device_bandwidth:
        return None
    reach = reach_of(budget.device)
    compute, read = [], []
    for kind, nbytes in records:
        step = planned_step(
            anatomy, budget, {kind: nbytes}, hit_rate=0.0, offloaded_bytes=offloaded_bytes
        )
        bound = decode_bound(step, budget)
        if bound is None:
            return None
        compute.append(nbytes / (kernel_share(reach.kernels, kind) * budget.device_bandwidth))
        read.append(bound.below)
    kinds = read_by_kind(anatomy)
    dense = sum(kinds.values())
    dense_rate = dense_share(reach.kernels, dense, kinds) * budget.device_bandwidth
    outside = dense - sum(layer.dense_bytes for layer in anatomy.layers)
    waiting = outside / dense_rate
    before = []
    for layer in anatomy.layers:
        waiting += reach.layer_seconds + layer.dense_bytes / dense_rate
        if layer.experts is not None:
            before.append(waiting)
            waiting = 0.0
    before[0] += waiting
    return Pace(tuple(before), tuple(compute), tuple(read), reach.miss_seconds)
