"""One combination of the levers, counted: its bytes, its slots, its speed, whether it meets what was asked.

In a mixed precision as many prototypes have the wider kind as leave every prototype resident,
beside the workspace that a resident model gets; where not even the narrow ones all fit, none has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.levers import PRECISIONS, record_bytes, scopes, spread
from conmoe_edge.plan.needs import needs_of
from conmoe_edge.plan.placement import Placement, place, room_beside_workspace
from conmoe_edge.plan.plan import Candidate
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.speed import tokens_per_second
from conmoe_edge.plan.width_levers import alike, pool_kept, trimmed


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate with its division of the memory.

    ``allowed`` is false for what is only shown for comparison; ``pointless`` is a mixed precision
    that has room for no wide record; ``meets`` says whether every wish is fulfilled.
    """

    candidate: Candidate
    placement: Placement
    allowed: bool
    pointless: bool
    meets: bool


def count_option(
    anatomy: ModelAnatomy,
    budget: Budget,
    context: int,
    precision: str,
    rate: float,
    request: PlanRequest,
    *,
    trims: bool,
) -> Option:
    """Count one combination. ``trims``: the method removes neurons as well as experts. ``verdict`` and ``reason``
    stay empty.
    """
    pools = scopes(anatomy, request.scope_layers)
    # Where widths differ, what they come to is not known yet: counted are the bytes of whole experts.
    trims = trims and alike(precision, equal=request.equal)
    counts = [pool_kept(anatomy, layers, rate, precision, trims=trims) for layers in pools]
    if trims:
        anatomy = trimmed(anatomy, rate, precision)
    experts = {
        layer.index: layer.experts for layer in anatomy.moe_layers if layer.experts is not None
    }
    kinds = PRECISIONS[precision].kinds
    sizes = [
        [record_bytes(experts[layers[0]], kind) for layers in pools]
        for kind in (kinds[0], kinds[-1])
    ]

    def pool_bytes(wide: int) -> int:
        return _pool_bytes(counts, sizes[0], sizes[1], wide)

    needs = needs_of(anatomy, budget.device, context)
    prototypes = sum(counts)
    wide = 0
    if len(kinds) == 2:
        room = room_beside_workspace(needs, budget.device_bytes, max(sizes[0]))
        wide = _most(pool_bytes, prototypes, room)
    record = max(sizes[0]) if wide else max(sizes[1])
    placement = place(
        needs,
        budget.device_bytes,
        prototypes=prototypes,
        record_bytes=record,
        pool_bytes=pool_bytes(wide),
        wanted_share=request.least_resident,
    )
    slots = placement.slots if placement.fits else 0
    share = slots / prototypes
    speed = None
    if placement.fits:
        speed = tokens_per_second(
            anatomy,
            budget,
            precision=precision,
            resident_share=share,
            offloaded_bytes=max(0, pool_bytes(wide) - slots * record),
            wide_share=wide / prototypes,
        )
    candidate = Candidate(
        precision=precision,
        rate=rate,
        scope=request.scope_layers,
        prototypes=prototypes,
        record_bytes=record,
        pool_bytes=pool_bytes(wide),
        slots=slots,
        resident_share=share,
        tokens_per_second=speed,
        verdict="",
        reason="",
        wide_prototypes=wide,
    )
    pointless = len(kinds) == 2 and wide == 0 and request.precision == "auto"
    meets = placement.fits and share >= request.least_resident - 1e-9
    allowed = request.forced_rate in (None, rate)
    return Option(candidate, placement, allowed, pointless, meets and not pointless)


def _pool_bytes(
    counts: Sequence[int], wide_sizes: Sequence[int], narrow_sizes: Sequence[int], wide: int
) -> int:
    """Bytes of all records where ``wide`` of them have the wider kind."""
    return sum(
        many * wider + (count - many) * narrower
        for many, count, wider, narrower in zip(
            spread(wide, counts), counts, wide_sizes, narrow_sizes, strict=True
        )
    )


def _most(nbytes: Callable[[int], int], count: int, room: int) -> int:
    """The most wide records, up to ``count``, with which all records are inside ``room``; 0 where
    none is.
    """
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if nbytes(middle) <= room else (low, middle - 1)
    return low
