"""What is known of a model's settings from earlier fits, beside the plan's candidates. Arithmetic only.

The plan's order (fewer bits before fewer experts) is a rule, measured on one small model
(docs/auto.md). Where fits of *this* model have left receipts, they say more: ``advise`` names a setting that
fits and lost less than the chosen one did. It proposes nothing that was not measured, says nothing where it has
nothing better, and changes no plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from conmoe_edge.memory.outcomes import Outcome
from conmoe_edge.plan.plan import Candidate, Plan
from conmoe_edge.plan.reasons import percent

_SAME_BITS = 0.02
_NOISE = 0.002
"""To which the rise of the loss is known on the receipt's text (docs/auto.md)."""


def measured(
    candidate: Candidate, plan: Plan, outcomes: Sequence[Outcome], method: str
) -> Outcome | None:
    """The newest outcome of a candidate's setting in the formats of its ``plan``; at rate 0 all methods are the same,
    and so are bits that hardly differ.
    """
    for one in reversed(outcomes):
        if _formats(one) != _formats(plan):
            continue
        if candidate.bits and one.bits:
            if abs(one.bits - candidate.bits) < _SAME_BITS:
                return one
            continue
        same = (one.precision, one.rate, one.scope if one.rate else candidate.scope)
        wanted = (candidate.precision, candidate.rate, candidate.scope)
        if (
            same == wanted
            and one.wide_prototypes == candidate.wide_prototypes
            and (one.method == method or one.rate == 0.0)
            and not (candidate.bits or one.bits)
        ):
            return one
    return None


def _formats(one: Outcome | Plan) -> tuple[str, str]:
    return one.dense_precision, one.kv_precision


def advise(plan: Plan, outcomes: Sequence[Outcome], method: str) -> str:
    """A setting that cost less and fits as well, where there is one; empty otherwise, and where the chosen setting has
    not been measured, or the model stays as it is.
    """
    if plan.unchanged:
        return ""
    chosen = measured(plan.chosen, plan, outcomes, method)
    if chosen is None:
        return ""
    room = max(plan.left_for_prototypes, plan.chosen.resident_bytes)
    better = [
        one
        for one in outcomes
        if (one.calibration, *_formats(one)) == (chosen.calibration, *_formats(chosen))
        and one.pool_bytes <= room
        and one.loss_rise < chosen.loss_rise - _NOISE
    ]
    if not better:
        return ""
    best = min(better, key=lambda one: one.loss_rise)
    return (
        f"{setting(best)} fits as well, and cost less on this model: {cost(best)}, this plan {cost(chosen)}. "
        f"Take it with {flags(best)}."
    )


def setting(one: Outcome) -> str:
    """``int4``, ``25 % auto int4``, ``2.60 bits``."""
    if one.bits:
        return f"{one.bits:.2f} bits"
    return one.precision if one.rate == 0.0 else f"{percent(one.rate)} {one.method} {one.precision}"


def cost(one: Outcome) -> str:
    """``+0.140 nats``."""
    return f"{one.loss_rise:+.4f} nats"


def flags(one: Outcome) -> str:
    """What to type for it."""
    if one.bits:
        return f"--bits {one.bits:.2f}"
    parts = [f"--precision {one.precision}", f"--rate {one.rate:g}"]
    if one.rate:
        parts.append(f"--method {one.method}")
    if one.rate and one.scope > 1:
        parts.append(f"--scope {one.scope}")
    return " ".join(parts)
