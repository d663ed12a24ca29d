"""Bytes that the plan chooses where each prototype has the neurons and bits that it is worth, and a speed to reach."""

from __future__ import annotations

import itertools

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.plan.bits_ladder import LEAST_BITS
from conmoe_edge.plan.levers import FREE
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest

RATES = {"device_bandwidth": 50e9, "disk_bandwidth": 1e9}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_bytes_are_those_that_leave_every_prototype_resident(olmoe, budget, device):
    sizes = ("24GB", "10GB", "6.5GB", "5.5GB", "4.5GB", "4GB")
    plans = [make_plan(olmoe, budget(size, device), trims=True) for size in sizes]
    assert [one.chosen.precision for one in plans] == ["source", "int8", *[FREE] * 4]
    assert plans[0].unchanged
    for size, plan in zip(sizes[2:], plans[2:], strict=True):
        chosen = plan.chosen
        assert chosen.rate == 0 and chosen.resident_share == 1
        left = budget(size).device_bytes - plan.device_bytes_used
        assert 0 <= left < olmoe.expert_count  # not a byte an expert
        assert "resident" in chosen.reason
    bits = [one.chosen.bits for one in plans[2:]]
    assert bits == sorted(bits, reverse=True) and bits[-1] > LEAST_BITS and bits[0] < 8.1


def test_round_bits_are_shown_around_the_chosen_ones(olmoe, budget):
    plan = make_plan(olmoe, budget("4.5GB"), trims=True)
    free = [one for one in plan.candidates if one.bits]
    assert all(a.pool_bytes > b.pool_bytes for a, b in itertools.pairwise(free))
    shown = [round(one.bits, 2) for one in free if one is not plan.chosen]
    assert shown == [6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0]
    for one in free:
        assert one.reason and one.verdict in ("chosen", "fits", "slow")
        if one.bits < plan.chosen.bits:
            assert "fewer bits" in one.reason
        elif one.bits > plan.chosen.bits:
            assert "resident" in one.reason


def test_too_little_for_the_least_bits_is_slow_and_says_so(olmoe, budget):
    plan = make_plan(olmoe, budget("2.6GB"), trims=True)
    assert plan.chosen.bits == pytest.approx(LEAST_BITS, abs=0.01)
    assert plan.chosen.resident_share < 1 and "resident" in plan.chosen.reason


def test_what_is_forced_is_done_as_before(olmoe, budget):
    for levers in ({"rate": 0.25}, {"precision": "int4"}, {"widths": "equal"}, {"scope": 2}):
        plan = make_plan(olmoe, budget("4GB"), PlanRequest(**levers), trims=True)
        assert not any(one.bits for one in plan.candidates)
    plain = make_plan(olmoe, budget("4GB"))
    assert not any(one.bits for one in plain.candidates), "methods that do not trim"


def test_a_speed_is_reached_with_the_most_bits_that_do(olmoe, budget):
    machine = budget("5GB", "cpu", **RATES)
    free = make_plan(olmoe, machine, trims=True).chosen
    assert free.bits and free.resident_share == 1
    wanted = 1.1 * (free.tokens_per_second or 0.0)
    plan = make_plan(olmoe, machine, PlanRequest(min_speed=wanted), trims=True)
    assert (plan.chosen.tokens_per_second or 0.0) >= wanted > 0.0 and plan.chosen.bits
    more = plan.chosen.bits + 0.05
    asked = PlanRequest(bits=more, precision=FREE)
    slower = make_plan(olmoe, machine, asked, trims=True).chosen.tokens_per_second
    assert slower is not None and slower < wanted
    easy = make_plan(olmoe, machine, PlanRequest(min_speed=0.5), trims=True)
    assert easy.chosen.pool_bytes == free.pool_bytes
    assert [one.verdict for one in plan.candidates].count("chosen") == 1


def test_a_speed_out_of_reach_is_refused_with_one_that_is_not(olmoe, budget):
    machine = budget("8GB", "cpu", **RATES)
    with pytest.raises(UsageError) as caught:
        make_plan(olmoe, machine, PlanRequest(min_speed=1e6), trims=True)
    flag, speed = caught.value.fix.split()
    assert flag == "--min-speed"
    found = make_plan(olmoe, machine, PlanRequest(min_speed=float(speed)), trims=True)
    assert (found.chosen.tokens_per_second or 0.0) >= float(speed)


def test_a_speed_without_a_bandwidth_is_refused(olmoe, budget):
    with pytest.raises(UsageError) as caught:
        make_plan(olmoe, budget("8GB"), PlanRequest(min_speed=10.0), trims=True)
    assert "--bits" in caught.value.fix


@pytest.mark.parametrize(
    "wrong", [{"bits": 3.0}, {"rate": 0.25}, {"engine": "gguf"}], ids=lambda one: next(iter(one))
)
def test_speed_and_what_fixes_it_do_not_go_together(wrong):
    with pytest.raises(UsageError) as caught:
        PlanRequest(min_speed=10.0, **wrong)
    assert "leave out" in caught.value.fix
    for speed in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError):
            PlanRequest(min_speed=speed)
