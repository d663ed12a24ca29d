"""What is said of a model's settings once some of them have been measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conmoe_edge.memory.outcomes import Outcome
from conmoe_edge.plan.advice import advise, frontier, measured
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest

MIB = 1 << 20
SOURCE: Any = {"dense_precision": "source", "kv_precision": "source"}


def outcome(precision: str, rate: float, mib: float, loss: float, **more: object) -> Outcome:
    one = Outcome(
        "model", "auto", rate, 1, precision, "source", 0, int(mib * MIB), loss, loss, 8000, "t", "1"
    )
    return replace(one, **more)  # type: ignore[arg-type]


INT8 = outcome("int8", 0.0, 6500, 0.0002)
INT4 = outcome("int4", 0.0, 3500, 0.1)
HALF = outcome("bf16", 0.5, 6144, 0.06)
BAD = outcome("source", 0.75, 3600, 0.2)


def test_the_frontier_is_what_no_other_beats_in_bytes_and_loss() -> None:
    known = (INT4, BAD, INT8, HALF)
    for one in known:
        beaten = any(
            o.pool_bytes <= one.pool_bytes and o.loss_rise < one.loss_rise
            for o in known
            if o != one
        )
        assert (one in frontier(known)) != beaten
    assert frontier(known) == (INT8, HALF, INT4)
    assert frontier(()) == ()
    assert frontier((INT4, replace(INT4, method="conmoe"))) == (replace(INT4, method="conmoe"),)


def test_what_was_measured_on_another_text_is_not_compared() -> None:
    assert frontier((replace(INT8, calibration="other"), INT4)) == (INT4,)


def test_an_outcome_belongs_to_its_setting(olmoe, budget) -> None:
    plan = make_plan(olmoe, budget("4GB"), PlanRequest(rate=0.25, **SOURCE), trims=True)
    by_rate = {(one.precision, one.rate): one for one in plan.candidates}
    whole, part = by_rate["int4", 0.0], by_rate["int4", 0.25]
    mine = outcome("int4", 0.25, 2600, 0.14)
    assert measured(part, plan, (INT4, mine), "auto") == mine
    assert measured(whole, plan, (INT4, mine), "conmoe") == INT4, "rate 0 has no method"
    assert measured(part, plan, (mine,), "conmoe") is None
    for other in (replace(plan, dense_precision="int8"), replace(plan, kv_precision="int8")):
        assert measured(part, other, (mine,), "auto") is None
    newer = replace(mine, loss_rise=0.13)
    assert measured(part, plan, (mine, newer), "auto") == newer


def test_the_advice_names_the_frontier_and_a_better_setting_that_fits(olmoe, budget) -> None:
    assert advise(make_plan(olmoe, budget("8GB")), (), "auto") == ""
    plan = make_plan(olmoe, budget("9GB"), PlanRequest(rate=0.5, precision="source"), trims=True)
    text = advise(plan, (INT4, HALF), "auto")
    assert "int4 (3.42 GiB, +0.1000 nats)" in text and "50 % auto bf16" in text
    assert "also fits" not in text, "nothing is known about the chosen one"
    chosen = outcome("source", 0.5, plan.chosen.pool_bytes / MIB, 0.06)
    text = advise(plan, (INT8, chosen), "auto")
    assert text.endswith(
        "int8 also fits and cost less than this plan (+0.0600 nats): --precision int8 --rate 0."
    )
    assert "also fits" not in advise(plan, (INT8, replace(chosen, loss_rise=0.0001)), "auto")
