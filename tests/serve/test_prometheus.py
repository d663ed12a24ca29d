"""The text for Prometheus."""

from __future__ import annotations

from typing import Any

import pytest

from conmoe_edge.offload.fastpath.report import FastPathReport
from conmoe_edge.offload.runtime import RuntimeStats
from conmoe_edge.serve.intake import Intake
from conmoe_edge.serve.prometheus import FIRST_TOKEN_BUCKETS, Metrics, Snapshot

NOBODY = Intake(lambda: 0, 1, 1)


def test_buckets_add_up() -> None:
    metrics = Metrics()
    times = [0.05, 0.1, 0.2, 400.0]
    for seconds in times:
        metrics.first_token(seconds)
    metrics.answer("stop", 5, 2, 7)
    samples: dict[str, Any] = dict(
        line.rsplit(" ", 1)
        for line in metrics.text(Snapshot(), 'a"b\n', NOBODY).splitlines()
        if not line.startswith("#")
    )
    name = "conmoe_first_token_seconds"
    for bound in FIRST_TOKEN_BUCKETS:
        below = sum(seconds <= bound for seconds in times)
        assert samples[f'{name}_bucket{{le="{bound}"}}'] == str(below)
    assert samples[f'{name}_bucket{{le="+Inf"}}'] == samples[f"{name}_count"] == "4"
    assert float(samples[f"{name}_sum"]) == pytest.approx(sum(times))
    assert samples['conmoe_model_info{model="a\\"b\\n"}'] == "1"
    assert samples["conmoe_completion_tokens_total"] == "7"


@pytest.mark.parametrize("summary", [None, 'native, "4" of 4 layers'])
def test_what_computes_is_a_metric(summary: str | None) -> None:
    stats = RuntimeStats(1, 2, 3, 4, 5, 6, 7, 8, None, "cpu", kernel="native, AVX2")
    path = None if summary is None else FastPathReport((), reason=summary)
    lines = Metrics().text(Snapshot(runtime=stats, fast_path=path), "m", NOBODY).splitlines()
    shown = "" if summary is None else summary.replace('"', '\\"')
    assert f'conmoe_compute_info{{kernel="native, AVX2",fast_path="{shown}"}} 1' in lines
