"""Bounds against figures worked out by hand, and what the speed model adds to them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from conmoe_edge.plan.levers import FREE
from conmoe_edge.plan.speed import (
    REACH,
    StepBytes,
    decode_bound,
    dense_read_bytes,
    distinct_share,
    expected_seconds,
    kernel_share,
    planned_step,
    prefill_bound,
    routed_bytes,
    tokens_per_second,
)
from conmoe_edge.units import GIB

_CARD = {"device_bandwidth": 1008e9, "link_bandwidth": 26e9}


def _bound(anatomy, budget, share, offloaded=0):
    step = planned_step(
        anatomy,
        budget,
        routed_bytes(anatomy, "source"),
        hit_rate=share,
        offloaded_bytes=offloaded,
    )
    bound = decode_bound(step, budget)
    assert bound is not None
    return bound


def _speed(anatomy, budget, share, offloaded=0, **more):
    speed = tokens_per_second(
        anatomy,
        budget,
        precision=more.pop("precision", "source"),
        resident_share=share,
        offloaded_bytes=offloaded,
        **more,
    )
    assert speed is not None
    return speed


def test_olmoe_bytes_per_token(olmoe):
    assert routed_bytes(olmoe, "source") == {"source": 16 * 8 * 12 * 2**20}
    table = 50304 * 2048 * 2
    assert dense_read_bytes(olmoe) == olmoe.dense_bytes - table
    tied = replace(olmoe, outside_bytes=olmoe.outside_bytes - table)
    assert dense_read_bytes(tied) == tied.dense_bytes


def test_a_mixed_precision_is_between_its_kinds(olmoe):
    wide, narrow = (sum(routed_bytes(olmoe, kind).values()) for kind in ("int8", "int4"))
    mixed = routed_bytes(olmoe, "int8+int4", 0.25)
    assert mixed == {"int8": 0.25 * wide, "int4": 0.75 * narrow}


@pytest.mark.parametrize(
    ("share", "serial", "overlapped"),
    [(0, 16, 16), (0.5, 30, 32), (0.75, 56, 65), (0.9, 117, 161), (1, 429, 429)],
)
def test_bounds_of_olmoe_on_a_4090(olmoe, budget, share, serial, overlapped):
    bound = _bound(olmoe, budget("24GB", **_CARD), share)
    assert 1 / bound.serial == pytest.approx(serial, rel=0.01, abs=0.5)
    assert 1 / bound.overlapped == pytest.approx(overlapped, rel=0.01, abs=0.5)


def test_unknown_bandwidths_give_no_speed(olmoe, budget):
    only_memory = budget("24GB", device_bandwidth=1008e9)
    for machine, share, known in (
        (budget("24GB"), 1.0, False),
        (only_memory, 1.0, True),
        (only_memory, 0.9, False),
    ):
        routed = routed_bytes(olmoe, "source")
        step = planned_step(olmoe, machine, routed, hit_rate=share, offloaded_bytes=0)
        speed = tokens_per_second(
            olmoe, machine, precision="source", resident_share=share, offloaded_bytes=0
        )
        assert (speed is not None) == (decode_bound(step, machine) is not None) == known


def test_what_the_ram_does_not_hold_comes_from_the_disk(olmoe, budget):
    fast = budget("8GB", **_CARD, disk_bandwidth=3e9, host_bytes=6 * GIB)
    in_ram = _speed(olmoe, fast, 0.5, 6 * GIB)
    assert in_ram == _speed(olmoe, budget("8GB", **_CARD), 0.5)
    half_on_disk = _speed(olmoe, replace(fast, host_bytes=3 * GIB), 0.5, 6 * GIB)
    all_on_disk = _speed(olmoe, replace(fast, host_bytes=0), 0.5, 6 * GIB)
    assert in_ram > half_on_disk > all_on_disk
    routed = sum(routed_bytes(olmoe, "source").values())
    bound = _bound(olmoe, replace(fast, host_bytes=0), 0.5, 6 * GIB)
    assert bound.below == pytest.approx(routed / 2 / 3e9)
    # A disk that is faster than the link gains nothing: its bytes cross the link as well.
    quick = _bound(olmoe, replace(fast, host_bytes=0, disk_bandwidth=90e9), 0.5, 6 * GIB)
    assert quick.below == pytest.approx(routed / 2 / 26e9)


def test_cpu_misses_come_from_the_disk(olmoe, budget):
    machine = budget("8GB", "cpu", device_bandwidth=38e9, disk_bandwidth=2e9, host_bytes=0)
    routed = sum(routed_bytes(olmoe, "source").values())
    bound = _bound(olmoe, machine, 0.5)
    assert bound.device == pytest.approx((dense_read_bytes(olmoe) + routed) / 38e9)
    assert bound.below == pytest.approx(routed / 2 / 2e9)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_expected_speed_stays_below_the_bound_and_is_made_of_its_parts(olmoe, budget, device):
    machine = budget("8GB", device, device_bandwidth=20e9, link_bandwidth=9e9, disk_bandwidth=1e9)
    reach = REACH[device]
    step = StepBytes(dense=1e9, routed={"int4": 4e8}, from_disk=1e8, from_host=0, layers=16)
    expected = (1e9 / reach.kernels["source"] + 4e8 / reach.kernels["int4"]) / 20e9 + 0.1
    expected += 16 * reach.layer_seconds
    missing = expected_seconds(replace(step, missed=3.5), machine)
    assert missing == pytest.approx(expected + 3.5 * reach.miss_seconds)
    seconds, bound = expected_seconds(step, machine), decode_bound(step, machine)
    assert seconds == pytest.approx(expected)
    assert seconds is not None and bound is not None and seconds > bound.serial
    assert _speed(olmoe, machine, 0.5) < 1 / _bound(olmoe, machine, 0.5).serial


def test_misses_are_counted_by_the_requests(olmoe, budget):
    machine = budget("8GB", "cpu", device_bandwidth=20e9, disk_bandwidth=1e9)
    routed = routed_bytes(olmoe, "source")
    step = planned_step(olmoe, machine, routed, hit_rate=0.75, offloaded_bytes=0)
    assert step.missed == 0.25 * 16 * 8
    step = planned_step(olmoe, machine, routed, hit_rate=0.75, offloaded_bytes=0, requests=100)
    assert step.missed == 25


def test_fewer_bits_and_more_hits_are_faster(olmoe, budget):
    machine = budget("8GB", "cpu", device_bandwidth=20e9, disk_bandwidth=1e9)
    speeds = [_speed(olmoe, machine, 0.5, precision=one) for one in ("source", "int8", "int4")]
    assert speeds == sorted(speeds) and len(set(speeds)) == 3
    assert _speed(olmoe, machine, 0.5) < _speed(olmoe, machine, 0.9) < _speed(olmoe, machine, 1.0)


def test_every_kind_of_record_has_its_constants():
    from conmoe_edge.plan.levers import PRECISIONS

    kinds = {kind for one in PRECISIONS.values() for kind in one.kinds}
    pairs = {kind for kind in kinds if "-" in kind}
    for reach in REACH.values():
        assert set(reach.kernels) == {*(kinds - pairs), FREE, "q6"}  # of dense matrices alone
        for kind in pairs:  # between those of its two forms
            both = [reach.kernels[one] for one in kind.split("-")]
            assert min(both) <= kernel_share(reach.kernels, kind) <= max(both)
        assert all(0 < share <= 1 for share in reach.kernels.values())


def test_distinct_prototypes_against_draws():
    assert distinct_share([1] * 64, 64, 8) == pytest.approx(1.0)
    assert distinct_share([64], 64, 8) == pytest.approx(1 / 8)
    assert 8 * distinct_share([2] * 32, 64, 8) == pytest.approx(7.56, abs=0.01)
    assert distinct_share([1] * 32, 64, 8) == pytest.approx(0.5)  # half of the slots lead nowhere
    counts, draw = [5, 1, 1, 3, 2], random.Random(0)
    slots = [number for number, count in enumerate(counts) for _ in range(count)]
    seen = sum(len(set(draw.sample(slots, 4))) for _ in range(20000)) / 20000
    assert 4 * distinct_share(counts, 12, 4) == pytest.approx(seen, abs=0.03)


def test_the_bound_of_a_prompt(budget):
    machine = budget("8GB", "cpu", disk_bandwidth=1e9)
    bound = prefill_bound([(3e12, 1e12), (2e12, 2e12), (0.0, 0.0)], 2e9, 0.0, machine)
    assert bound is not None
    assert (bound.device, bound.below) == (4.0, 2.0)
    assert (bound.serial, bound.overlapped) == (6.0, 4.0)
    assert prefill_bound([(4e12, 1e12)], 2e9, 0.0, budget("8GB", "cpu")) is None
