"""What is asked of a plan: which values make no sense, and what they mean."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.plan.request import Levers, PlanRequest


def test_keywords_of_the_calls_are_the_fields() -> None:
    assert list(Levers.__annotations__) == [field.name for field in fields(PlanRequest)]


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"context": 0}, "--context 4096"),
        ({"rate": 1.0}, "--rate"),
        ({"rate": -0.5}, "--rate"),
        ({"rate": math.nan}, "--rate"),
        ({"rate": math.inf}, "--rate"),
        ({"rate": 25}, "--rate 0.25"),
        ({"scope": 0}, "--scope auto"),
        ({"precision": "fp3"}, "--precision auto"),
        ({"dense_precision": "int3"}, "--dense-precision int8"),
        ({"prefer": "beauty"}, "--prefer quality, or --prefer speed"),
        ({"min_resident": 80}, "--min-resident 0.8"),
        ({"widths": "narrow"}, "--widths free"),
        ({"device": "gpu"}, "--device auto"),
        ({"calibration_tokens": 0}, "--calibration-tokens 32768"),
    ],
)
def test_nonsense_is_refused_with_a_fix(wrong, fix) -> None:
    with pytest.raises(UsageError) as caught:
        PlanRequest(**wrong)
    assert fix in caught.value.fix
    assert "{" not in caught.value.what


def test_what_is_left_open_has_a_meaning() -> None:
    open_ = PlanRequest()
    assert (open_.forced_rate, open_.scope_layers, open_.least_resident) == (None, 1, 0.8)
    assert (open_.equal, open_.tokens) == (False, 32768)
    asked = PlanRequest(rate=0.0, scope=4, prefer="speed", widths="equal", calibration_tokens=512)
    assert (asked.forced_rate, asked.scope_layers, asked.least_resident) == (0.0, 4, 1.0)
    assert (asked.equal, asked.tokens) == (True, 512)
    assert PlanRequest(prefer="speed", min_resident=0.0).least_resident == 0.0


def test_the_same_request_is_the_same_json() -> None:
    value = PlanRequest(rate=0.25, min_resident=0.5).to_json()
    assert json.loads(json.dumps(value)) == value
    assert value == PlanRequest(rate=0.25, min_resident=0.5, calibration_tokens=32768).to_json()
    assert value != PlanRequest(rate=0.25).to_json()
