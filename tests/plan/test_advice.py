"""What is said of a model's settings once some of them have been measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conmoe_edge.memory.outcomes import Outcome
from conmoe_edge.plan.advice import advise, measured
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


def test_it_speaks_only_where_it_has_something_better(olmoe, budget) -> None:
    assert advise(make_plan(olmoe, budget("8GB")), (), "auto") == ""
    plan = make_plan(olmoe, budget("9GB"), PlanRequest(rate=0.5, precision="source"), trims=True)
    assert advise(plan, (INT8, INT4, HALF), "auto") == "", "nothing is known about the chosen one"
    chosen = outcome("source", 0.5, plan.chosen.pool_bytes / MIB, 0.06)
    text = advise(plan, (INT8, INT4, chosen), "auto")
    assert text == (
        "int8 fits as well, and cost less on this model: +0.0002 nats, this plan +0.0600 nats. "
        "Take it with --precision int8 --rate 0."
    )
    for other in (
        INT4,  # costs more
        replace(INT8, loss_rise=0.059),  # within the noise
        replace(INT8, pool_bytes=99 << 30),  # does not fit
        replace(INT8, calibration="other"),  # another text
        replace(INT8, dense_precision="int8"),  # other formats beside it
        chosen,
    ):
        assert advise(plan, (other, chosen), "auto") == ""


def test_nothing_is_better_than_a_model_that_stays_as_it_is(olmoe, budget) -> None:
    plan = make_plan(olmoe, budget("24GB"))
    assert plan.unchanged
    whole = outcome(plan.chosen.precision, 0.0, plan.chosen.pool_bytes / MIB, 0.5)
    assert measured(plan.chosen, plan, (whole,), "auto") == whole
    assert advise(plan, (INT8, whole), "auto") == ""
