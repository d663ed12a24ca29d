"""What ``bench`` knows of a package before a token is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_reports import report_of
from families import tiny_model
from hand_packages import thirds, write_package
from torch.utils._python_dispatch import TorchDispatchMode

from conmoe_edge.api.bench_facts import byte_share, record_shares, replayed_hit_rate
from conmoe_edge.checkpoint.format.manifest import CacheSettings
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.cli.views.bench_table import machine_line
from conmoe_edge.offload.generation import benchmark
from conmoe_edge.offload.generation.benchmark import byte_rate, matrix_rate
from conmoe_edge.offload.kernels.cpu.bindings import operator


def test_shares_of_layouts_follow_the_routing_weight(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    write_package(model, tmp_path / "package", thirds(model))
    manifest = load_manifest(tmp_path / "package")
    assert record_shares(manifest) == pytest.approx({"source": manifest.layouts[0].nbytes})
    wide = replace(manifest.layouts[0], precision="int8", nbytes=8192)
    narrow = replace(manifest.layouts[0], precision="int4", nbytes=4096)
    first = manifest.prototypes[0].id
    mixed = replace(
        manifest,
        layouts=(wide, narrow),
        prototypes=tuple(
            replace(
                one,
                layout=0 if one.id == first else 1,
                weight=3.0 if one.id == first else 1.0 / (len(manifest.prototypes) - 1),
            )
            for one in manifest.prototypes
        ),
        cache=(
            CacheSettings(slots=1, policy="lru", predicted_hit=1.0),
            CacheSettings(slots=4, policy="lru", predicted_hit=0.6),
        ),
    )
    assert record_shares(mixed) == pytest.approx({"int8": 0.75 * 8192, "int4": 0.25 * 4096})
    assert replayed_hit_rate(mixed, 5) == pytest.approx(0.9)
    assert replayed_hit_rate(mixed, 4) is None
    assert replayed_hit_rate(manifest, 5) is None
    assert byte_share(manifest) == byte_share(mixed) == 0.0
    scaled = replace(wide.parts[0], name=f"{wide.parts[0].name}.scale")
    mixed = replace(mixed, layouts=(replace(wide, parts=(*wide.parts, scaled)), narrow))
    assert byte_share(mixed) == pytest.approx(0.75)


def test_the_bound_of_a_prompt_counts_both_kinds_of_operations() -> None:
    report = report_of(prompt_byte_operations=2e12, byte_operations_per_second=400e9)
    assert report.prefill.bound is not None
    assert report.prefill.bound.device == pytest.approx((10.0 + 5.0) / 500)
    assert report.to_json()["machine"]["byte_operations_per_second"] == 400e9
    assert report_of().to_json()["machine"]["byte_operations_per_second"] is None
    assert "400 GOP/s" in machine_line(report) and "GOP" not in machine_line(report_of())


def test_the_rate_of_products_of_bytes_is_one_of_a_processor() -> None:
    engine = operator()
    if engine is None:
        pytest.skip("this machine cannot compile the operator")
    assert engine.byte_products(0) == 0
    assert byte_rate(torch.device("cpu")) == 0 or 1e8 < byte_rate(torch.device("cpu")) < 1e15


def test_a_processor_without_bf16_is_not_asked_for_products_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of them takes it seconds, and every plan would wait for it."""
    seen: set[torch.dtype] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket is torch.ops.aten.mm:
                seen.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(benchmark, "native_bf16", lambda: False)
    with Products():
        assert matrix_rate(torch.device("cpu")) > 1e8
    assert seen == {torch.float32}
