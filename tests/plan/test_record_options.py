"""Records that a prototype may become: their bytes, and what a budget in bits comes to."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.records import form_of
from conmoe_edge.errors import UsageError
from conmoe_edge.plan.levers import FREE, FREE_KINDS, record_bytes, record_parts
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.record_options import (
    beside_bytes,
    bits_of_bytes,
    bits_of_pool,
    bytes_of_bits,
    constant_bytes,
    expert_weights,
    free_range,
    free_widths,
    pool_of_bits,
    record_options,
)
from conmoe_edge.plan.request import PlanRequest


def test_gate_and_up_have_one_form_and_down_another(olmoe):
    layout = make_layout(record_parts(olmoe.layers[0].experts, "q3-q4"), "q3-q4")
    assert form_of(layout, "gate_up_proj") == "q3" and form_of(layout, "down_proj") == "q4"
    sizes = [record_bytes(olmoe.layers[0].experts, kind) for kind in ("q3", "q3-q4", "q4")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


def test_options_are_widths_times_kinds_by_their_true_bytes(olmoe):
    experts = olmoe.layers[0].experts
    found = record_options(experts, FREE)
    assert {one.width for one in found} == {256, 512, 768, 1024}
    assert len(found) == 4 * len(FREE_KINDS)
    assert all(a.nbytes <= b.nbytes for a, b in itertools.pairwise(found))
    for one in found:
        layout = make_layout(record_parts(experts.narrowed(one.width), one.kind), one.kind)
        assert layout.nbytes == one.nbytes


def test_a_shape_that_few_bits_cannot_take_has_what_is_left(model):
    """Down projections of 48 columns are int8 in all of them; the widths would be no whole groups."""
    odd = model(hidden=64, width=48).layers[0].experts
    assert free_widths(odd) == (48,)
    kinds = [one.kind for one in record_options(odd, FREE)]
    assert sorted(kinds) == sorted(("int8", "q4", "q3-q4", "q2-q3"))
    none = model(hidden=40, width=24).layers[0].experts
    assert [one.kind for one in record_options(none, FREE)] == ["int8"]


def test_bits_are_bytes_of_the_originals_weights(olmoe):
    assert expert_weights(olmoe) == 16 * 64 * 3 * 2048 * 1024
    assert bytes_of_bits(olmoe, 4.0) == expert_weights(olmoe) // 2
    assert bits_of_bytes(olmoe, bytes_of_bits(olmoe, 2.6)) == pytest.approx(2.6)


def test_bits_count_what_is_beside_the_prototypes(olmoe, model):
    """Map and headers, for which constants make room; constants of all slots at the most in memory."""
    assert constant_bytes(olmoe) == 16 * 64 * 2048 * 4
    assert 16 * (64 * 64 + 4096) < beside_bytes(olmoe) < 16 * 64 * 256
    assert pool_of_bits(olmoe, 2.6) == bytes_of_bits(olmoe, 2.6) - beside_bytes(olmoe)
    assert bits_of_pool(olmoe, pool_of_bits(olmoe, 2.6)) == pytest.approx(2.6)


def test_bits_that_were_asked_for_are_what_is_planned(olmoe, budget):
    plan = make_plan(olmoe, budget("8GB"), PlanRequest(bits=2.6, precision=FREE), trims=True)
    chosen = plan.chosen
    assert chosen.precision == FREE and chosen.rate == 0 and chosen.verdict == "chosen"
    assert chosen.pool_bytes == bytes_of_bits(olmoe, 2.6) - beside_bytes(olmoe)
    assert chosen.pool_bytes == chosen.resident_bytes
    assert chosen.bits == pytest.approx(2.6) and chosen.resident_share == 1
    terms = {term.name: term.nbytes for term in plan.terms}
    assert terms["Slot constants"] == constant_bytes(olmoe)
    assert plan.disk_bytes == olmoe.dense_bytes + chosen.pool_bytes
    assert plan.device_bytes_used <= 8 * 10**9
    assert "2.6 bits" in chosen.reason


@pytest.mark.parametrize("size", ["2.5GB", "3.5GB", "5GB"])
def test_without_bits_the_budget_gives_them(olmoe, budget, size):
    plan = make_plan(olmoe, budget(size), PlanRequest(precision=FREE), trims=True)
    least, most = free_range(olmoe)
    assert least <= plan.chosen.pool_bytes <= most
    assert plan.chosen.resident_share == 1
    assert plan.device_bytes_used <= budget(size).device_bytes
    more = make_plan(olmoe, budget("6GB"), PlanRequest(precision=FREE), trims=True)
    assert more.chosen.pool_bytes > plan.chosen.pool_bytes
    assert more.prefill_chunk >= plan.prefill_chunk


def test_what_has_no_room_is_partly_resident(olmoe, budget):
    plan = make_plan(olmoe, budget("4GB"), PlanRequest(precision=FREE, bits=6.0), trims=True)
    chosen = plan.chosen
    assert 0 < chosen.resident_share < 1 and chosen.resident_bytes < chosen.pool_bytes
    assert plan.device_bytes_used <= 4 * 10**9
    assert "resident" in chosen.reason


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"bits": 0.0}, "--bits 3"),
        ({"bits": -1.0}, "--bits 3"),
        ({"bits": float("nan")}, "--bits 3"),
        ({"bits": 64}, "--bits 3"),
        ({"bits": 3, "rate": 0.25}, "leave out --rate"),
        ({"bits": 3, "rate": 0.0}, "leave out --rate"),
        ({"bits": 3, "precision": "int4"}, "leave out --precision"),
        ({"bits": 3, "widths": "equal"}, "leave out --widths"),
        ({"bits": 3, "engine": "hf"}, "leave out --for"),
        ({"precision": FREE, "rate": 0.25}, "leave out --rate"),
        ({"precision": FREE, "widths": "equal"}, "leave out --widths"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, fix):
    with pytest.raises(UsageError) as caught:
        PlanRequest(**wrong)
    assert fix in caught.value.fix


@pytest.mark.parametrize("bits", [0.001, 20.0])
def test_bits_that_the_model_cannot_have_are_refused_with_some_that_it_can(olmoe, budget, bits):
    with pytest.raises(UsageError) as caught:
        make_plan(olmoe, budget("8GB"), PlanRequest(bits=bits, precision=FREE), trims=True)
    words = caught.value.fix.split()
    if words[0] == "--bits":
        asked = PlanRequest(bits=float(words[1]), precision=FREE)
        assert make_plan(olmoe, budget("8GB"), asked, trims=True).chosen.verdict == "chosen"
    else:
        assert bits == 20.0 and "int8" in caught.value.fix


def test_layers_of_unequal_size_get_bytes_by_their_weights(model):
    from conmoe_edge.plan.record_options import layer_room

    anatomy = model(layers=2)
    wide = model(layers=2, width=64).layers[1]
    mixed = replace(anatomy, layers=(anatomy.layers[0], wide))
    rooms = [layer_room(mixed, one, 30000) for one in (0, 1)]
    assert rooms == [10000, 20000]
