"""Speed by the bandwidths, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conmoe_edge.plan.speed import dense_read_bytes, routed_bytes, tokens_per_second
from conmoe_edge.units import GIB

_CARD = {"device_bandwidth": 1008e9, "link_bandwidth": 26e9}


def _speed(anatomy, budget, share, offloaded=0):
    return tokens_per_second(
        anatomy, budget, precision="source", resident_share=share, offloaded_bytes=offloaded
    )


def test_olmoe_bytes_per_token(olmoe):
    assert routed_bytes(olmoe, "source") == 16 * 8 * 12 * 2**20
    table = 50304 * 2048 * 2
    assert dense_read_bytes(olmoe) == olmoe.dense_bytes - table
    tied = replace(olmoe, outside_bytes=olmoe.outside_bytes - table)
    assert dense_read_bytes(tied) == tied.dense_bytes


@pytest.mark.parametrize(
    ("share", "expected"), [(0, 16), (0.5, 30), (0.75, 56), (0.9, 117), (1, 429)]
)
def test_serial_speed_of_olmoe_on_a_4090(olmoe, budget, share, expected):
    assert _speed(olmoe, budget("24GB", **_CARD), share) == pytest.approx(
        expected, rel=0.01, abs=0.5
    )


def test_unknown_bandwidths_give_no_speed(olmoe, budget):
    assert _speed(olmoe, budget("24GB"), 1.0) is None
    only_memory = budget("24GB", device_bandwidth=1008e9)
    assert _speed(olmoe, only_memory, 1.0) is not None
    assert _speed(olmoe, only_memory, 0.9) is None


def test_what_the_ram_does_not_hold_comes_from_the_disk(olmoe, budget):
    fast = budget("8GB", **_CARD, disk_bandwidth=3e9, host_bytes=6 * GIB)
    in_ram = _speed(olmoe, fast, 0.5, 6 * GIB)
    assert in_ram == _speed(olmoe, budget("8GB", **_CARD), 0.5)
    half_on_disk = _speed(olmoe, replace(fast, host_bytes=3 * GIB), 0.5, 6 * GIB)
    all_on_disk = _speed(olmoe, replace(fast, host_bytes=0), 0.5, 6 * GIB)
    assert in_ram and half_on_disk and all_on_disk
    assert in_ram > half_on_disk > all_on_disk
    routed = routed_bytes(olmoe, "source")
    seconds = (dense_read_bytes(olmoe) + routed) / 1008e9 + routed / 2 / 3e9
    assert all_on_disk == pytest.approx(1 / seconds)


def test_cpu_misses_come_from_the_disk(olmoe, budget):
    machine = budget("8GB", "cpu", device_bandwidth=38e9, disk_bandwidth=2e9, host_bytes=0)
    routed = routed_bytes(olmoe, "source")
    seconds = (dense_read_bytes(olmoe) + routed) / 38e9 + routed / 2 / 2e9
    assert _speed(olmoe, machine, 0.5) == pytest.approx(1 / seconds)
