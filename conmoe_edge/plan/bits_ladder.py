"""What is looked at where the plan chooses the bytes of prototypes that have the neurons and bits that they are worth.

The model as it is and in 8 bits first, then fewer bits a weight, in round numbers to look at, and the bytes that leave
every prototype resident, which are taken. Fewer than ``LEAST_BITS`` only where they are asked for: below that the rest
stays offloaded, and too little memory costs speed. Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from conmoe_edge.errors import UsageError
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.candidate import Option
from conmoe_edge.plan.free_bytes import asked_bytes, count_free, resident_bytes
from conmoe_edge.plan.record_options import bytes_of_bits, free_range, pool_of_bits
from conmoe_edge.plan.request import PlanRequest

ROUND_BITS = (6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0)
LEAST_BITS = 2.0
_FINEST = 0.01
"""Bits between which the most that reach a speed are looked for."""


def free_options(
    anatomy: ModelAnatomy, budget: Budget, context: int, request: PlanRequest
) -> list[Option]:
    """Where nothing but free prototypes was asked for: the bits that were, or those that the budget gives, among round
    ones to compare with.

    Raises:
        UsageError: bits that there cannot be.
    """
    if request.bits is not None:
        pool = asked_bytes(anatomy, request.bits)
        return [count_free(anatomy, budget, context, request, pool=pool)]
    least, most = free_range(anatomy)
    return _rows(anatomy, budget, context, request, least, most)


def ladder(
    anatomy: ModelAnatomy,
    budget: Budget,
    context: int,
    request: PlanRequest,
    milder: Sequence[Option],
) -> list[Option]:
    """Behind ``milder`` ones, whose last is the smallest: free prototypes in fewer bytes."""
    least = max(free_range(anatomy)[0], pool_of_bits(anatomy, LEAST_BITS))
    most = milder[-1].candidate.pool_bytes - 1
    if most <= least:
        return list(milder)
    return [*milder, *_rows(anatomy, budget, context, request, least, most)]


def _rows(
    anatomy: ModelAnatomy, budget: Budget, context: int, request: PlanRequest, least: int, most: int
) -> list[Option]:
    """Round ones only to look at, and the one that is taken, by bytes falling."""
    taken = max(least, min(most, resident_bytes(anatomy, budget, context)))
    around = {pool_of_bits(anatomy, bits) for bits in ROUND_BITS}
    around = {one for one in around if least <= one <= most}
    if around and taken == most and request.precision == "auto":
        taken = max(around)  # what comes before is hardly larger and resident, too
    shown = sorted({taken, *around}, reverse=True)
    return [
        count_free(anatomy, budget, context, request, pool=pool, allowed=pool == taken)
        for pool in shown
    ]


def fast_enough(
    anatomy: ModelAnatomy,
    options: Sequence[Option],
    chosen: Option,
    wanted: float,
    count: Callable[[int], Option],
) -> Option:
    """The mildest option whose expected speed is ``wanted`` tokens a second: ``chosen``, or a milder one than it is not
    looked at; behind it the first that is allowed, else the most bits of free prototypes.

    Raises:
        UsageError: none reaches it, or speeds are not known.
    """
    speeds = [one.candidate.tokens_per_second for one in options]
    if chosen.candidate.tokens_per_second is None:
        raise UsageError(
            "--min-speed wants a speed that is not known here.",
            "the bandwidth of the target's memory is neither measured nor part of a profile",
            "a profile for --gpu (conmoe-edge profiles), or --bits",
        )
    behind = options[list(options).index(chosen) :]
    for one in behind:
        if one.allowed and (one.candidate.tokens_per_second or 0.0) >= wanted:
            return one
    least = pool_of_bits(anatomy, LEAST_BITS)
    free = [one for one in behind if one.candidate.bits]
    if free and chosen.allowed:
        low, high = (
            max(free_range(anatomy)[0], least),
            max(one.candidate.pool_bytes for one in free),
        )
        step = max(1, bytes_of_bits(anatomy, _FINEST))
        best: Option | None = None
        while low <= high:
            middle = (low + high) // 2
            found = count(middle)
            if (found.candidate.tokens_per_second or 0.0) >= wanted:
                best, low = found, middle + step
            else:
                high = middle - step
        if best is not None:
            return best
    fastest = max((one for one in speeds if one is not None), default=0.0)
    raise UsageError(
        f"--min-speed {wanted:g} is more than any setting is expected to reach.",
        f"the fastest of them is expected to make {fastest:.4g} tokens a second",
        f"--min-speed {_down(fastest)}",
    )


def _down(speed: float) -> str:
    """Two digits, rounded down, so that it is reached."""
    return f"{int(speed * 10) / 10:g}" if speed < 10 else f"{int(speed)}"
