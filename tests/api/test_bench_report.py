"""The report of ``bench`` from figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from bench_reports import BUDGET, report_of

from conmoe_edge.plan.speed import REACH


def test_bounds_and_shares() -> None:
    report = report_of()
    decode = report.decode
    assert decode.tokens_per_second.median == 2.5
    assert (decode.tokens_per_second.low, decode.tokens_per_second.high) == (2.0, 4.0)
    assert decode.hit_rate == 0.9
    assert decode.memory_bytes == 2e9  # 0.4 GB dense, 100 prototypes of 16 MB
    assert decode.disk_bytes == 160e6
    assert decode.bound is not None
    assert (decode.bound.device, decode.bound.below) == pytest.approx((0.1, 0.16))
    assert decode.share == pytest.approx(2.5 * 0.26)
    assert decode.share_overlapped == pytest.approx(2.5 * 0.16)
    assert decode.waited_share == pytest.approx(0.2)
    assert report.expected_ratio == pytest.approx(2.5 / 4)
    prefill = report.prefill
    assert prefill.tokens_per_second.median == 25
    assert report.first_token_seconds.median == 20
    assert prefill.bound is not None
    assert 500 * prefill.bound.serial == pytest.approx(10.0 + 3.2)
    assert prefill.share == pytest.approx(13.2 / 20)


def test_speed_is_expected_for_the_reads_that_were_measured() -> None:
    """0.4 GB dense, 90 of 100 prototypes of 16 MB are there, in bf16; layers and misses cost their own."""
    reach = REACH["cpu"]
    moved = 0.4e9 / reach.kernels["source"] + 1.6e9 / reach.kernels["bf16"]
    seconds = moved / 20e9 + 0.16 + 16 * reach.layer_seconds + 10 * reach.miss_seconds
    assert report_of().expected_reads == pytest.approx(1 / seconds)
    few = report_of(dense_kinds={"q4": 0.3e9, "source": 0.1e9})
    assert few.expected_reads is not None and few.expected_reads < 1 / seconds
    assert few.to_json()["expected"]["tokens_per_second_with_these_reads"] == few.expected_reads
    assert report_of(budget=replace(BUDGET, device_bandwidth=None)).expected_reads is None


def test_a_machine_that_could_not_be_measured_has_no_bound() -> None:
    report = report_of(budget=replace(BUDGET, device_bandwidth=None), expected=None)
    assert report.decode.bound is None and report.decode.share is None
    assert report.expected_ratio is None
    assert json.loads(json.dumps(report.to_json()))["decode"]["bound"] is None


def test_the_fast_path_is_in_the_json_where_it_is_known() -> None:
    assert list(report_of().to_json()["runtime"]) == ["kernel", "policy", "reads"]
    known = report_of(fast_path="all layers", fast_path_json={"layers": 3}).to_json()
    assert known["runtime"]["fast_path"] == {"layers": 3}
