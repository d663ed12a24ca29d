"""What a prompt is expected to take, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.prompt_speed import (
    PROMPT_REACH,
    Arithmetic,
    PromptWork,
    asked_share,
    dense_operations,
    expected_prompt,
    experts_in_bytes,
    planned_prompt,
    prompt_reads,
)
from conmoe_edge.plan.request import PlanRequest

RATES = {"device_bandwidth": 36e9, "link_bandwidth": 0.5e9, "disk_bandwidth": 0.5e9}
HERE = Arithmetic(floats=90e9, bytes=938e9)


@pytest.fixture
def shape(with_matrices):
    """OLMoE with its attention, table and head."""
    matrices = with_matrices.dense_matrices
    table = replace(matrices[-1], looked_up=True)
    return replace(with_matrices, dense_matrices=(*matrices, table))


def test_operations_outside_the_experts(shape):
    inner, head = 2.0 * 16 * 4 * 2048 * 2048, 2.0 * 50304 * 2048
    assert dense_operations(shape, "source", 512) == (512 * inner + head, 0)
    assert dense_operations(shape, "q4", 512) == (0, 512 * inner + head)
    tied = replace(shape, dense_matrices=shape.dense_matrices[:-2] + shape.dense_matrices[-1:])
    assert dense_operations(tied, "int8", 512) == (0, 512 * inner + head)


def test_what_was_measured_of_olmoe_and_gpt_oss(shape, budget):
    """The prompts that the constants come from, with all resident: within a tenth."""
    plan = make_plan(
        shape, budget("8GB", "cpu", **RATES), PlanRequest(precision="q3", dense_precision="int8")
    )
    assert plan.chosen.resident_share == 1
    found = planned_prompt(shape, plan, HERE)
    assert found is not None and found.tokens == 512
    assert found.seconds == pytest.approx(3.3, rel=0.1)
    assert found.tokens_per_second == pytest.approx(512 / found.seconds)
    active = 24 * (4 * 3 * 2880 * 2880 + 2880 * 5120 + 4096 * 2880)
    work = PromptWork(256, 24, 2880, 0, 0, 0, 2.0 * 256 * active)
    machine = budget("8GB", "cpu", **{**RATES, "device_bandwidth": 33e9})
    assert expected_prompt(work, machine, HERE) == pytest.approx(4.55, rel=0.1)


def test_in_floating_point_without_an_operator_and_in_bf16(shape, budget):
    whole = make_plan(shape, budget("24GB", "cpu", **RATES))
    found = planned_prompt(shape, whole, HERE)
    assert found is not None and found.seconds == pytest.approx(16.6, rel=0.1)
    asked = PlanRequest(precision="q3", dense_precision="int8")
    plan = make_plan(shape, budget("8GB", "cpu", **RATES), asked)
    without = planned_prompt(shape, plan, Arithmetic(HERE.floats, 0))
    assert without is not None and without.seconds == pytest.approx(found.seconds)


def test_each_chunk_reads_what_it_asks_for_once(olmoe, budget):
    machine = budget("8GB", "cpu", **RATES)
    assert prompt_reads(olmoe, 10**9, 2048, 2048, machine) == (pytest.approx(10**9), 0)
    assert prompt_reads(olmoe, 10**9, 2048, 512, machine)[0] == pytest.approx(4 * 10**9)
    assert prompt_reads(olmoe, 10**9, 600, 512, machine)[0] == pytest.approx(2 * 10**9, rel=1e-4)
    assert prompt_reads(olmoe, 10**9, 1, 512, machine)[0] == pytest.approx(10**9 / 8)
    assert prompt_reads(olmoe, 0, 2048, 512, machine) == (0, 0)
    card = budget("8GB", "cuda", **RATES, host_bytes=25 * 10**7)
    disk, host = prompt_reads(olmoe, 10**9, 512, 512, card)
    assert (disk, host) == (pytest.approx(75 * 10**7), pytest.approx(25 * 10**7))
    assert asked_share(2, 4, 2) == 0.75


def test_reading_goes_on_beside_the_experts_only(budget):
    machine = budget("8GB", "cpu", **RATES)
    reach = PROMPT_REACH["cpu"]
    work = PromptWork(512, 16, 2048, 0, 1e12, 0, 1e12)
    between = reach.between * 512 * 16 * 2048 / 36e9
    dense = experts = 1e12 / (reach.bytes * 938e9)
    resident = expected_prompt(work, machine, HERE)
    assert resident == pytest.approx(dense + between + experts)
    hidden = replace(work, from_disk=0.5e9 * experts * 0.9)
    assert expected_prompt(hidden, machine, HERE) == pytest.approx(resident)
    bound = replace(work, from_disk=0.5e9 * 20)
    assert expected_prompt(bound, machine, HERE) == pytest.approx(dense + between + 20)


def test_longer_chunks_make_a_long_prompt_faster(shape, budget):
    machine = budget("8GB", "cpu", **RATES)
    asked = PlanRequest(rate=0, precision="source", kv_precision="source", min_resident=0.4)
    plan = make_plan(shape, machine, asked)
    assert plan.prefill_chunk > 1024
    short = replace(plan, prefill_chunk=512)
    long_prompt, before = (planned_prompt(shape, one, HERE, 2048) for one in (plan, short))
    assert long_prompt is not None and before is not None
    assert long_prompt.seconds < 0.85 * before.seconds
    cut = planned_prompt(shape, plan, HERE, 10**6)
    assert cut is not None and cut.tokens == plan.context


@pytest.mark.parametrize("unknown", ["device_bandwidth", "disk_bandwidth"])
def test_unknown_rates_give_no_time(budget, unknown):
    work = PromptWork(512, 16, 2048, 0, 1e12, 0, 1e12, from_disk=1e9)
    rates = {**RATES, unknown: None}
    if unknown == "disk_bandwidth":
        rates["link_bandwidth"] = None
    assert expected_prompt(work, budget("8GB", "cpu", **rates), HERE) is None
    assert expected_prompt(work, budget("8GB", "cpu", **RATES), Arithmetic(90e9, 0)) is None


def test_what_is_made_of_bytes():
    assert [
        experts_in_bytes(kind) for kind in ("source", "bf16", "lowrank", "int8", "q3", "free")
    ] == [
        *(0, 0, 0),
        *(1, 1, 1),
    ]
    assert experts_in_bytes("bf16+int8", 0.25) == 0.75
    assert experts_in_bytes("int8+int4", 0.25) == 1
