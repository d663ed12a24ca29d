"""A plan survives the way through JSON text; a damaged one is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from conmoe_edge.errors import PackageError
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.serialise import plan_from_json, plan_to_json


@pytest.fixture
def plan(olmoe, budget):
    return make_plan(olmoe, budget("8GB", device_bandwidth=1008e9, link_bandwidth=25.6e9))


def test_round_trip_through_text(plan):
    written = plan_to_json(plan)
    assert written["schema_version"] == 1
    assert written["device_bytes_used"] == plan.device_bytes_used
    text = json.dumps(written, allow_nan=False)
    assert json.loads(text) == written
    assert plan_from_json(json.loads(text)) == plan


def test_plans_from_before_mixed_precision_are_read(plan):
    written = plan_to_json(plan)
    for candidate in (written["chosen"], *written["candidates"]):
        del candidate["wide_prototypes"]
    assert plan_from_json(written).chosen == replace(plan.chosen, wide_prototypes=0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("context",), "many"),
        (("budget", "device"), "tpu"),
        (("candidates",), 7),
        (("chosen", "slots"), None),
    ],
)
def test_damage_is_refused(plan, path, value):
    written = copy.deepcopy(plan_to_json(plan))
    target = written
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(PackageError):
        plan_from_json(written)


def test_a_missing_field_is_named(plan):
    written = plan_to_json(plan)
    del written["terms"]
    with pytest.raises(PackageError, match="terms"):
        plan_from_json(written)
