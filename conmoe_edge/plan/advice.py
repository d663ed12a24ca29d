"""What is known of a model's settings from earlier fits, beside the plan's candidates. Arithmetic only.

The plan's order (fewer bits before fewer experts) is a rule, measured on one small model
(docs/auto.md). Where fits of *this* model have left receipts, they say more: ``advise`` names the
settings on the frontier, those that no other measured one beats in both bytes and loss. It proposes
nothing that was not measured, and it changes no plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from conmoe_edge.memory.outcomes import Outcome
from conmoe_edge.plan.plan import Candidate, Plan
from conmoe_edge.plan.reasons import percent
from conmoe_edge.units import human_size

_SAME_BITS = 0.02


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


def frontier(outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """The outcomes that no other beats in bytes and loss, the most bytes first; of equals the newest.

    Only those measured on the same text as the newest one can be compared, and are.
    """
    if not outcomes:
        return ()
    alike = [
        one
        for one in outcomes
        if (one.calibration, *_formats(one)) == (outcomes[-1].calibration, *_formats(outcomes[-1]))
    ]
    found: list[Outcome] = []
    for number, one in enumerate(alike):
        beaten = any(
            (other.pool_bytes, other.loss_rise) != (one.pool_bytes, one.loss_rise)
            and other.pool_bytes <= one.pool_bytes
            and other.loss_rise <= one.loss_rise
            for other in alike
        )
        again = any(
            (other.pool_bytes, other.loss_rise) == (one.pool_bytes, one.loss_rise)
            for other in alike[number + 1 :]
        )
        if not beaten and not again:
            found.append(one)
    return tuple(sorted(found, key=lambda one: -one.pool_bytes))


def _formats(one: Outcome | Plan) -> tuple[str, str]:
    return one.dense_precision, one.kv_precision


def advise(plan: Plan, outcomes: Sequence[Outcome], method: str) -> str:
    """One or two sentences from what was measured; empty where nothing was."""
    best = frontier(outcomes)
    if not best:
        return ""
    named = ", ".join(f"{setting(one)} ({human_size(one.pool_bytes)}, {cost(one)})" for one in best)
    text = f"Measured on this model so far, nothing does better for its bytes than: {named}."
    chosen = measured(plan.chosen, plan, outcomes, method)
    room = max(plan.left_for_prototypes, plan.chosen.resident_bytes)
    inside = [one for one in best if one.pool_bytes <= room]
    if chosen is None or not inside:
        return text
    least = min(inside, key=lambda one: one.loss_rise)
    if least.loss_rise < chosen.loss_rise and least != chosen:
        text += (
            f" {setting(least)} also fits and cost less than this plan ({cost(chosen)}): "
            f"{flags(least)}."
        )
    return text


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
