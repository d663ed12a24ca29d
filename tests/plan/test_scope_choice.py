"""Which scopes a fit measures, and which one it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.scope_choice import (
    nearest,
    scope_note,
    scopes_to_try,
    trial_bytes,
    with_scope,
)
from conmoe_edge.plan.serialise import plan_from_json, plan_to_json


def tried(anatomy, budget, *, keeps=True, **levers):
    request = PlanRequest(method="energy", **levers)
    plan = make_plan(anatomy, budget("4GB"), request)
    return scopes_to_try(anatomy, request, plan.chosen, keeps=keeps)


def test_two_scopes_are_tried_where_nobody_named_one(model, budget):
    assert tried(model(), budget, rate=0.5) == (1, 2)
    assert tried(model(dense_layers=(1, 3)), budget, rate=0.25) == (1, 2)


@pytest.mark.parametrize(
    "levers",
    [
        {"rate": 0.5, "scope": 1},
        {"rate": 0.5, "scope": 2},
        {"rate": 0.0},
        {"rate": 0.5, "keeps": False},
        {"rate": 0.5, "engine": "vllm"},
    ],
)
def test_none_is_tried_where_there_is_no_choice(model, budget, levers):
    keeps = levers.pop("keeps", True)
    engine = levers.pop("engine", None)
    request = PlanRequest(method="energy", **levers)
    chosen = make_plan(model(), budget("4GB"), request).chosen
    request = replace(request, engine=engine)
    assert scopes_to_try(model(), request, chosen, keeps=keeps) == ()


def test_none_is_tried_where_no_two_layers_can_share(model, budget):
    assert tried(model(layers=3, dense_layers=(0, 2)), budget, rate=0.5) == ()


def test_none_is_tried_where_pools_would_have_another_number_of_prototypes(model, budget):
    assert tried(model(count=7), budget, rate=0.35) == ()  # 5 and 5, or 9
    assert tried(model(count=8), budget, rate=0.3) == ()  # 6 and 6, or 11


def test_the_nearest_is_taken_and_the_smallest_where_they_tie():
    assert nearest({1: 0.2, 2: 0.1}) == 2
    assert nearest({1: 0.1, 2: 0.2}) == nearest({2: 0.1, 1: 0.1}) == 1


def test_the_plan_has_the_scope_and_nothing_else_changes(model, budget):
    plan = make_plan(model(), budget("4GB"), PlanRequest(method="energy", rate=0.5))
    pooled = with_scope(plan, 2)
    assert (plan.chosen.scope, pooled.chosen.scope) == (1, 2)
    assert pooled.chosen in pooled.candidates and len(pooled.candidates) == len(plan.candidates)
    assert with_scope(pooled, 1) == plan
    assert plan_from_json(plan_to_json(pooled)) == pooled
    forced = make_plan(model(), budget("4GB"), PlanRequest(method="energy", rate=0.5, scope=2))
    assert forced.chosen == pooled.chosen


def test_the_note_says_what_was_measured_and_how_to_have_the_other():
    note = scope_note({1: 0.17263, 2: 0.14881}, 2)
    assert "0.1726 with pools of 1 layer, 0.1488 with pools of 2 layers" in note
    assert "Scope 2" in note and "--scope 1" in note and "--scope 2" not in note


def test_disk_for_the_experts_of_two_layers(model):
    anatomy = model()
    each = anatomy.moe_layers[0].experts
    assert trial_bytes(anatomy, (1, 2)) == 2 * each.count * each.expert_bytes
    assert trial_bytes(anatomy, ()) == 0
