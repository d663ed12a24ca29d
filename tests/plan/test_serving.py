"""``--for vllm``: what is forced, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.serving import request_for

ASKED = PlanRequest(budget="24GB", rate=0.25)


def test_what_is_left_open_is_forced_and_all_else_is_as_it_was() -> None:
    forced = {"scope": 1, "precision": "source", "min_resident": 1.0, "widths": "equal"}
    forced |= {"dense_precision": "source", "kv_precision": "source"}
    assert request_for("vllm", ASKED) == replace(ASKED, **forced)


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
