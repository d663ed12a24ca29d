"""``--for vllm``: what is forced, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.plan.serving import levers_for

ASKED: dict[str, Any] = {
    "rate": "auto",
    "scope": "auto",
    "precision": "auto",
    "dense_precision": "source",
    "min_resident": None,
    "widths": "free",
    "prefer": "quality",
}


def test_what_is_left_open_is_forced_and_all_else_is_as_it_was() -> None:
    assert levers_for("vllm", ASKED) == {
        **ASKED,
        "scope": 1,
        "precision": "source",
        "min_resident": 1.0,
        "widths": "equal",
    }


def test_equal_widths_may_be_asked_for() -> None:
    assert levers_for("vllm", {**ASKED, "widths": "equal"})["widths"] == "equal"


@pytest.mark.parametrize("precision", ["bf16", "source"])
def test_sixteen_bits_may_be_asked_for(precision: str) -> None:
    assert levers_for("vllm", {**ASKED, "precision": precision})["precision"] == precision


@pytest.mark.parametrize(
    ("lever", "value", "flag"),
    [
        ("scope", 2, "--scope 2"),
        ("precision", "int4", "--precision int4"),
        ("dense_precision", "int8", "--dense-precision int8"),
        ("min_resident", 0.5, "--min-resident 0.5"),
    ],
)
def test_anything_else_is_refused_with_the_flag(lever: str, value: Any, flag: str) -> None:
    with pytest.raises(UsageError, match=flag) as caught:
        levers_for("vllm", {**ASKED, lever: value})
    assert caught.value.fix.startswith("leave out")
