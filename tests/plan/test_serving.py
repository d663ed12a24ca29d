"""``--for vllm``: what is forced, what is refused, and that every prototype is on the device."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from conmoe_edge.errors import DoesNotFit, UsageError
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.serving import request_for

ASKED = PlanRequest(budget="24GB", rate=0.25)


def test_what_is_left_open_is_forced_and_all_else_is_as_it_was() -> None:
    forced = {"scope": 1, "precision": "source", "min_resident": 1.0, "widths": "equal"}
    forced |= {"dense_precision": "source", "kv_precision": "source"}
    assert request_for("vllm", ASKED) == replace(ASKED, engine="vllm", **forced)


def test_equal_widths_may_be_asked_for() -> None:
    assert request_for("vllm", replace(ASKED, widths="equal")).widths == "equal"


@pytest.mark.parametrize("precision", ["bf16", "source"])
def test_sixteen_bits_may_be_asked_for(precision: str) -> None:
    assert request_for("vllm", replace(ASKED, precision=precision)).precision == precision


@pytest.mark.parametrize(
    ("lever", "value", "flag"),
    [
        ("scope", 2, "--scope 2"),
        ("precision", "int4", "--precision int4"),
        ("dense_precision", "int8", "--dense-precision int8"),
        ("kv_precision", "int8", "--kv-precision int8"),
        ("min_resident", 0.5, "--min-resident 0.5"),
    ],
)
def test_anything_else_is_refused_with_the_flag(lever: str, value: Any, flag: str) -> None:
    with pytest.raises(UsageError, match=flag) as caught:
        request_for("vllm", replace(ASKED, **{lever: value}))
    assert caught.value.fix.startswith("leave out")


@pytest.mark.parametrize("rate", ["auto", 0.25])
@pytest.mark.parametrize("trims", [True, False])
def test_a_budget_that_holds_only_some_is_refused_with_what_would_do(
    olmoe: Any, budget: Any, rate: Any, trims: bool
) -> None:
    """At 6 GB the cache would hold a part of them; vLLM has none."""
    asked = request_for("vllm", PlanRequest(rate=rate))
    ours = replace(asked, engine=None)
    assert 0 < make_plan(olmoe, budget("6GB"), ours, trims=trims).chosen.resident_share < 1
    with pytest.raises(DoesNotFit, match="every prototype on the device") as caught:
        make_plan(olmoe, budget("6GB"), asked, trims=trims)
    assert caught.value.exit_code == 3
    size, found = re.findall(r"--gpu (\S+) is .* or --rate (\d+)%", caught.value.fix)[0]
    wider = make_plan(olmoe, budget(size), asked, trims=trims).chosen
    assert wider.resident_share == 1.0 and wider.rate == (0.5 if rate == "auto" else rate)
    harder = make_plan(olmoe, budget("6GB"), replace(asked, rate=int(found) / 100), trims=trims)
    assert harder.chosen.resident_share == 1.0
    with pytest.raises(DoesNotFit):
        less = replace(asked, rate=(int(found) - 1) / 100)
        make_plan(olmoe, budget("6GB"), less, trims=trims)


def test_what_fits_is_planned_as_before(olmoe: Any, budget: Any) -> None:
    asked = request_for("vllm", PlanRequest(rate=0.25))
    plan = make_plan(olmoe, budget("24GB"), asked, trims=True)
    assert plan == make_plan(olmoe, budget("24GB"), replace(asked, engine=None), trims=True)
