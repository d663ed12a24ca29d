"""In what dense matrices, keys and values are stored where that is left to the plan. Arithmetic only.

All formats are as they are where the model fits so. Elsewhere 8 bits and fewer are taken only where the bytes that they
free keep more of the experts, and more than they cost. What both are worth is known of the demo model alone
(``priors.py``); a large model loses less by either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from conmoe_edge.errors import DoesNotFit, UsageError
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.dense_precision import DENSE_PRECISIONS, stored
from conmoe_edge.plan.kv_precision import KV_PRECISIONS, has_int8
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.priors import ANY_CHANGE, DENSE_COST, KV_COST, expected_divergence
from conmoe_edge.plan.record_options import bits_of_bytes
from conmoe_edge.plan.request import PlanRequest

_WHOLE = ("source", "bf16")
"""Precisions of experts that are none the worse for it."""


def choose_formats(
    anatomy: ModelAnatomy, request: PlanRequest, plan_in: Callable[[str, str], Plan]
) -> Plan:
    """The plan where ``dense_precision`` or ``kv_precision`` is ``auto``.

    Args:
        anatomy: of the model.
        request: what was asked.
        plan_in: the plan with the dense part, keys and values in given formats.

    Raises:
        DoesNotFit: nothing fits, with what the smallest needs.
        UsageError: what was asked cannot be had in any of them, a speed for one.
    """
    found: list[Plan] = []
    too_large: list[DoesNotFit] = []
    refused: UsageError | None = None
    for number, (dense, kv) in enumerate(_combinations(anatomy, request)):
        try:
            plan = plan_in(dense, kv)
        except DoesNotFit as error:
            too_large.append(error)
        except UsageError as error:
            refused = error
        else:
            if plan.unchanged and not number:
                return plan
            found.append(plan)
    if refused is not None and not found:
        raise refused
    if not found:
        raise min(too_large, key=lambda error: error.least_bytes or math.inf)
    return max(found, key=lambda plan: worth(anatomy, plan, request.least_resident))


def _combinations(anatomy: ModelAnatomy, request: PlanRequest) -> list[tuple[str, str]]:
    """Formats of the dense part and of keys and values, the mildest first."""
    dense: Sequence[str] = (request.dense_precision,)
    kv: Sequence[str] = (request.kv_precision,)
    if request.dense_precision == "auto":
        sizes = [stored(anatomy, one).dense_bytes for one in DENSE_PRECISIONS]
        dense = [
            one
            for i, one in enumerate(DENSE_PRECISIONS)
            if sizes[i] < min(sizes[:i], default=math.inf)
        ]
    if request.kv_precision == "auto":
        kv = KV_PRECISIONS if has_int8(anatomy) else ("source",)
    return [(one, other) for one in dense for other in kv]


def worth(anatomy: ModelAnatomy, plan: Plan, wanted: float) -> tuple[float, ...]:
    """The greater, the better: first fewer experts that are removed, then more of them resident, as far as that was
    ``wanted``, then what the model is expected to lose; of equals the mildest formats come first.
    """
    share = min(plan.chosen.resident_share, wanted)
    return -plan.chosen.rate, share, -_expected(anatomy, plan)


def _expected(anatomy: ModelAnatomy, plan: Plan) -> float:
    """Of the experts that stay, of the dense part, and of keys and values together, in nats."""
    chosen = plan.chosen
    lost = DENSE_COST[plan.dense_precision] + KV_COST[plan.kv_precision]
    if chosen.precision in _WHOLE and not chosen.width:
        return lost + ANY_CHANGE if lost else 0.0
    return lost + expected_divergence(
        bits_of_bytes(anatomy, chosen.pool_bytes) / (1.0 - chosen.rate)
    )
