"""Metrics of several processes as those of one."""

from __future__ import annotations

from conmoe_edge.serve.intake import Intake
from conmoe_edge.serve.metric_text import ModelMetrics
from conmoe_edge.serve.prometheus import Metrics, Snapshot

NOBODY = Intake(lambda: 0, 1, 1)


def said(**counts: int) -> str:
    """What a process says after so many answers."""
    metrics = Metrics()
    metrics.request("/v1/completions", 200)
    for _ in range(counts.get("answers", 0)):
        metrics.answer("stop", 10, 0, 3)
        metrics.first_token(0.2)
    return metrics.text(Snapshot(running=counts.get("running", 0)), "inside", NOBODY)


def samples(metrics: ModelMetrics) -> dict[str, float]:
    lines = list(metrics.text())
    heads = [line for line in lines if line.startswith("#")]
    assert len(heads) == len(set(heads)), "a family is described once"
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def test_each_sample_has_its_model() -> None:
    metrics = ModelMetrics()
    metrics.heard("a", said(answers=2, running=1))
    metrics.heard('b"', said(answers=1))
    found = samples(metrics)
    assert found['conmoe_answers_total{model="a",outcome="stop"}'] == 2
    assert found['conmoe_answers_total{model="b\\"",outcome="stop"}'] == 1
    assert found['conmoe_running{model="a"}'] == 1
    assert found['conmoe_first_token_seconds_bucket{model="a",le="0.25"}'] == 2
    assert not [name for name in found if name.startswith("conmoe_requests_total")]


def test_counters_outlive_a_process_and_what_it_held_does_not() -> None:
    metrics = ModelMetrics()
    metrics.heard("a", said(answers=2, running=1))
    metrics.gone("a")
    found = samples(metrics)
    assert found['conmoe_answers_total{model="a",outcome="stop"}'] == 2
    assert 'conmoe_running{model="a"}' not in found
    for _ in range(2):  # a second look at the same process adds nothing
        metrics.heard("a", said(answers=3, running=2))
        found = samples(metrics)
        assert found['conmoe_answers_total{model="a",outcome="stop"}'] == 5
        assert found['conmoe_first_token_seconds_count{model="a"}'] == 5
        assert found['conmoe_running{model="a"}'] == 2
    metrics.gone("a")
    metrics.gone("a")
    assert samples(metrics)['conmoe_answers_total{model="a",outcome="stop"}'] == 5
