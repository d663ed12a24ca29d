"""A report of ``bench`` from figures that are easy to follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conmoe_edge.api.bench_report import BenchFacts, BenchReport, make_report
from conmoe_edge.memory.budget import Budget
from conmoe_edge.offload.generation.benchmark import Phase, Round

BUDGET = Budget(
    "cpu", 4 << 30, "4GB", "test", device_bandwidth=20e9, link_bandwidth=1e9, disk_bandwidth=1e9
)


def facts(**more: Any) -> BenchFacts:
    values: dict[str, Any] = {
        "package": {
            "path": "out",
            "method": "conmoe",
            "rate": 0.5,
            "precision": "bf16",
            "prototypes": 512,
            "resident": 256,
            "slots": 256,
        },
        "settings": {"prompt_tokens": 500, "tokens": 10},
        "runtime": {"kernel": "compiled", "policy": "lru", "reads": ""},
        "budget": BUDGET,
        "threads": 2,
        "dense_bytes": 350_000_000,
        "cache_bytes": 50_000_000,
        "kept_bytes": 0.0,
        "record_bytes": {"bf16": 16e6},
        "prompt_flops": 1e12,
        "flops_per_second": 100e9,
        "layers": 16,
        "expected": 4.0,
        "planned": 3.5,
    }
    return BenchFacts(**{**values, **more})


def round_of(decode_seconds: float, **more: Any) -> Round:
    prefill = Phase(500, 20.0, 300, 200, 200 * 16_000_000, 0, 1.0)
    decode = Phase(10, decode_seconds, 900, 100, 100 * 16_000_000, 0, 0.8)
    return Round(prefill, replace(decode, **more), 3 << 30)


def report_of(**more: Any) -> BenchReport:
    return make_report(facts(**more), [round_of(4.0), round_of(5.0), round_of(2.5)])
