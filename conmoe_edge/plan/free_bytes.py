"""A candidate in which every prototype has the neurons and the bits that it is worth: only bytes are planned.

What becomes of each expert is found by the fit, so all of them are counted as prototypes,
records as their mean, and what a token reads as the mean too. Arithmetic only.
"""

from __future__ import annotations

from conmoe_edge.errors import UsageError
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.candidate import Option
from conmoe_edge.plan.levers import FREE
from conmoe_edge.plan.needs import needs_of
from conmoe_edge.plan.placement import place, room_beside_workspace
from conmoe_edge.plan.plan import Candidate
from conmoe_edge.plan.record_options import (
    beside_bytes,
    bits_of_pool,
    constant_bytes,
    expert_weights,
    free_range,
    pool_of_bits,
    record_options,
)
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.speed import expected_seconds, planned_step


def count_free(
    anatomy: ModelAnatomy,
    budget: Budget,
    context: int,
    request: PlanRequest,
    *,
    pool: int,
    allowed: bool = True,
) -> Option:
    """Count it with ``pool`` bytes in all. ``allowed`` as of ``Option``; ``verdict`` and ``reason`` stay empty."""
    needs = needs_of(anatomy, budget.device, context, constants=constant_bytes(anatomy))
    largest = _largest(anatomy)
    prototypes = anatomy.expert_count
    placement = place(
        needs,
        budget.device_bytes,
        prototypes=prototypes,
        record_bytes=largest,
        pool_bytes=pool,
        wanted_share=request.least_resident,
        slot_bytes=-(-pool // prototypes),
    )
    slots = placement.slots if placement.fits else 0
    share = slots / prototypes
    speed = None
    if placement.fits:
        step = planned_step(
            anatomy,
            budget,
            {FREE: _read_bytes(anatomy, pool)},
            hit_rate=share,
            offloaded_bytes=pool - min(pool, -(-pool * slots // prototypes)),
        )
        seconds = expected_seconds(step, budget)
        speed = None if seconds is None else 1.0 / seconds
    candidate = Candidate(
        precision=FREE,
        rate=0.0,
        scope=1,
        prototypes=prototypes,
        record_bytes=largest,
        pool_bytes=pool,
        slots=slots,
        resident_share=share,
        tokens_per_second=speed,
        verdict="",
        reason="",
        bits=bits_of_pool(anatomy, pool),
    )
    meets = placement.fits and share >= request.least_resident - 1e-9
    return Option(candidate, placement, allowed, False, meets)


def resident_bytes(anatomy: ModelAnatomy, budget: Budget, context: int) -> int:
    """The most bytes that leave every prototype resident beside the workspace; below 0 where there is no room."""
    needs = needs_of(anatomy, budget.device, context, constants=constant_bytes(anatomy))
    return room_beside_workspace(needs, budget.device_bytes, _largest(anatomy))


def asked_bytes(anatomy: ModelAnatomy, bits: float) -> int:
    """Bytes for the bits that were asked for.

    Raises:
        UsageError: they are fewer or more than there can be.
    """
    least, most = free_range(anatomy)
    pool = pool_of_bits(anatomy, bits)
    if pool < least:
        whole = least + beside_bytes(anatomy)
        enough = -(-whole * 800 // expert_weights(anatomy)) / 100
        raise UsageError(
            f"--bits {bits:g} is less than the prototypes of {anatomy.architecture} can have.",
            "every layer keeps at least one, in 2 bits and narrow",
            f"--bits {enough:g}",
        )
    if pool > most:
        raise UsageError(
            f"--bits {bits:g} is more than {anatomy.architecture} has a use for.",
            f"all experts whole in 8 bits are {bits_of_pool(anatomy, most):.2f} bits a weight",
            "--precision int8, or --precision source",
        )
    return pool


def _largest(anatomy: ModelAnatomy) -> int:
    """Bytes of the largest record that there may be."""
    return max(record_options(one, FREE)[-1].nbytes for one in anatomy.moe_experts)


def _read_bytes(anatomy: ModelAnatomy, pool: int) -> float:
    """Of routed experts that one token needs, where they are as large as the mean."""
    mean = pool / anatomy.expert_count
    return mean * sum(one.experts.top_k for one in anatomy.moe_layers if one.experts is not None)
