"""What the plan makes of the dense part and of keys and values where nobody says anything."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest

from conmoe_edge.errors import DoesNotFit, UsageError
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import DenseMatrix, ModelAnatomy
from conmoe_edge.model.kv_rows import row_bytes
from conmoe_edge.plan.dense_precision import DENSE_PRECISIONS
from conmoe_edge.plan.kv_precision import KV_PRECISIONS
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.priors import DEMO, demo_divergence, expected_divergence
from conmoe_edge.plan.record_options import bits_of_bytes
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.unasked_formats import worth


@pytest.fixture(scope="module")
def model(olmoe: ModelAnatomy) -> ModelAnatomy:
    """OLMoE with attention and head as what may be stored in fewer bits, and a cache that may."""
    matrices = tuple(
        DenseMatrix(layer.index, 2048, 2048, 2 * 2048 * 2048)
        for layer in olmoe.layers
        for _ in range(4)
    )
    head = DenseMatrix(None, 50304, 2048, 2 * 50304 * 2048, at_an_end=True)
    kv = tuple(replace(one, packed=2 * 16 * row_bytes(128)) for one in olmoe.kv)
    return replace(olmoe, dense_matrices=(*matrices, head), kv=kv)


def gigabytes(count: float) -> Budget:
    return Budget("cpu", int(count * 10**9), f"{count}GB", "test")


def plans(model: ModelAnatomy, budget: Budget, trims: bool, **asked: Any) -> list[Plan]:
    """In every combination of formats that fits, the mildest first."""
    found = []
    for dense, kv in product(DENSE_PRECISIONS, KV_PRECISIONS):
        request = PlanRequest(dense_precision=dense, kv_precision=kv, **asked)
        try:
            found.append(make_plan(model, budget, request, trims=trims))
        except DoesNotFit:
            continue
    return found


def formats(plan: Plan) -> tuple[str, str]:
    return plan.dense_precision, plan.kv_precision


def test_everything_is_as_it_is_where_it_fits(model: ModelAnatomy) -> None:
    least = next(
        size
        for size in range(10, 30)
        if make_plan(
            model,
            gigabytes(size),
            PlanRequest(dense_precision="source", kv_precision="source"),
        ).unchanged
    )
    for size in (least, least + 1, 64):
        plan = make_plan(model, gigabytes(size))
        assert plan.unchanged and formats(plan) == ("source", "source")


@pytest.mark.parametrize("trims", [True, False])
def test_fewer_bits_only_where_they_keep_more_of_the_experts(
    model: ModelAnatomy, trims: bool
) -> None:
    """And then what is taken is the best of all combinations."""
    seen = set()
    for size in (3, 3.5, 4, 4.5, 5, 6, 7, 8, 10, 13):
        budget = gigabytes(size)
        plan, every = make_plan(model, budget, trims=trims), plans(model, budget, trims)
        assert plan in every
        seen.add(formats(plan))
        plain = next((one for one in every if formats(one) == ("source", "source")), None)
        assert worth(model, plan, 0.8) == max(worth(model, one, 0.8) for one in every)
        if formats(plan) != ("source", "source") and plain is not None:
            more = bits_of_bytes(model, plan.chosen.pool_bytes) > bits_of_bytes(
                model, plain.chosen.pool_bytes
            )
            fewer = plan.chosen.rate < plain.chosen.rate
            there = plan.chosen.resident_share > plain.chosen.resident_share
            assert more or fewer or there, size
    assert ("source", "source") in seen and len(seen) > 2


def test_what_is_forced_stays(model: ModelAnatomy) -> None:
    for dense, kv in product((*DENSE_PRECISIONS, "auto"), (*KV_PRECISIONS, "auto")):
        request = PlanRequest(dense_precision=dense, kv_precision=kv)
        plan = make_plan(model, gigabytes(4), request, trims=True)
        assert plan.dense_precision == dense or dense == "auto"
        assert plan.kv_precision == kv or kv == "auto"


@pytest.mark.parametrize(
    "asked", [{"bits": 2.6}, {"rate": 0.5, "precision": "int4"}, {"precision": "q3", "rate": 0.0}]
)
def test_where_the_experts_are_forced_and_resident_nothing_else_gives(
    model: ModelAnatomy, asked: dict[str, Any]
) -> None:
    plan = make_plan(model, gigabytes(12), PlanRequest(**asked), trims=True)
    assert plan.chosen.resident_share == 1.0 and formats(plan) == ("source", "source")


def test_a_speed_that_only_fewer_bytes_reach(model: ModelAnatomy) -> None:
    """What is too slow in the model's own numbers is no reason to give up."""
    budget = replace(gigabytes(8), device_bandwidth=2e10, link_bandwidth=1e9, disk_bandwidth=1e9)
    source = {"dense_precision": "source", "kv_precision": "source"}
    with pytest.raises(UsageError, match="min-speed") as error:
        make_plan(model, budget, PlanRequest(min_speed=1e6, **source), trims=True)  # type: ignore[arg-type]
    fastest = float(re.findall(r"[\d.]+", error.value.fix)[0])
    asked = PlanRequest(min_speed=fastest * 1.1)
    found = make_plan(model, budget, asked, trims=True)
    speed = found.chosen.tokens_per_second
    assert speed is not None and speed >= fastest * 1.1
    assert found.dense_precision != "source"
    with pytest.raises(UsageError, match="more than any setting"):
        make_plan(model, budget, PlanRequest(min_speed=1e6), trims=True)


def test_what_is_expected_falls_with_bits() -> None:
    row = [expected_divergence(0.5 + 0.25 * step) for step in range(30)]
    assert all(one > other for one, other in pairwise(row))
    for bits, divergence in DEMO:
        assert expected_divergence(bits) == pytest.approx(divergence)
        assert demo_divergence(bits) == pytest.approx(divergence)
