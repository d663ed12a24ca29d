"""The error for an engine that holds every prototype on the device, where a budget holds only some of them.

Such an engine has no cache: what is planned with 40 % resident does not start there. The error names the least changes
that would do: a budget at what was asked, and a rate in this budget. Arithmetic only.
"""

from __future__ import annotations

from dataclasses import replace

from conmoe_edge.errors import DoesNotFit
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.candidate import Option, count_option
from conmoe_edge.plan.least import least_bytes, least_size
from conmoe_edge.plan.levers import AUTO_RATE_LIMIT
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.units import human_size

_PRECISION = "source"
"""The only one that such an engine takes (``plan/serving.py``)."""


def not_all_resident(
    anatomy: ModelAnatomy, budget: Budget, context: int, request: PlanRequest, *, trims: bool
) -> DoesNotFit:
    """The error. ``context`` in tokens; ``trims``: the method removes neurons as well as experts."""

    def counted(rate: float, device_bytes: int) -> Option:
        given = replace(budget, device_bytes=device_bytes)
        asked = replace(request, rate=rate)
        return count_option(anatomy, given, context, _PRECISION, rate, asked, trims=trims)

    rate = AUTO_RATE_LIMIT if request.forced_rate is None else request.forced_rate
    least = least_bytes(lambda nbytes: counted(rate, nbytes).meets, budget.device_bytes)
    now = counted(rate, budget.device_bytes)
    have = f"{100 * now.candidate.resident_share:.0f} % of the prototypes"
    fix = f"--gpu {least_size(least)} is the least that works at --rate {rate:.0%}"
    enough = (step / 100 for step in range(round(100 * rate) + 1, 100))
    found = next((one for one in enough if counted(one, budget.device_bytes).meets), None)
    if found is not None:
        fix += f"; or --rate {found:.0%} in {budget.asked}"
    return DoesNotFit(
        f"{anatomy.architecture} does not fit in {budget.asked} with every prototype on the device.",
        f"{request.engine} holds all of them there; with {rate:.0%} removed they and the rest need "
        f"{human_size(least)}, and the budget holds {have if now.placement.fits else 'none of them'}",
        fix,
        least,
    )
