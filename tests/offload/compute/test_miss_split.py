"""Prototypes that are not on the GPU: who computes them, and that the sums are those of copies but for a rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.errors import UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.experts import find_experts
from conmoe_edge.offload.compute import backend
from conmoe_edge.offload.compute.cpu_fallback import HostCompute
from conmoe_edge.offload.compute.experts_forward import HANDLE
from conmoe_edge.offload.compute.miss_split import MissCosts
from conmoe_edge.offload.storage import pinned_tier as host_tier
from conmoe_edge.offload.storage.pinned_tier import HostTier
from tests.families import tiny_model
from tests.hand_packages import identity, write_package
from tests.offload.kernels.interpreted import interpreted_operator


def test_copies_and_the_processor_are_over_together() -> None:
    assert MissCosts(copy=1.0, compute=1.0, detour=0.0).aside(8) == 4
    assert MissCosts(copy=3.0, compute=1.0, detour=0.0).aside(8) == 6
    assert MissCosts(copy=1.0, compute=3.0, detour=0.0).aside(8) == 2
    assert MissCosts(copy=1.0, compute=0.1, detour=2.5).aside(2) == 0, "the detour takes longer"
    assert MissCosts(copy=1.0, compute=0.1, detour=2.5).aside(8) == 5
    assert MissCosts(copy=1.0, compute=2.0, detour=0.0).aside(1) == 0
    assert MissCosts(copy=1.0, compute=1.0, detour=0.0).aside(0) == 0


_TIME = st.floats(0.0, 10.0)


@given(_TIME, _TIME, _TIME, st.integers(0, 12))
def test_no_other_division_is_over_sooner(
    copy: float, compute: float, detour: float, missing: int
) -> None:
    costs = MissCosts(copy, compute, detour)
    best = costs.aside(missing)
    every = [costs.seconds(missing, count) for count in range(missing + 1)]
    assert costs.seconds(missing, best) == min(every)
    assert all(seconds > min(every) for seconds in every[:best]), "of equal ones the least"


def test_a_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'gpu' is no way") as caught:
        load_package(tmp_path, misses="gpu")
    assert "copy, auto" in caught.value.why


@pytest.fixture
def package(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
    model = tiny_model("olmoe", dtype=torch.bfloat16, num_attention_heads=8, **sizes)
    weights = {
        slot.prototype: float(n)
        for n, row in enumerate(identity(model).values())
        for slot in row
        if slot.prototype is not None
    }
    return write_package(model, tmp_path / "package", identity(model), weights=weights)


def with_host_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, records: int, costs: MissCosts
) -> Any:
    """A package with an interpreted operator, few slots, and a tier in memory that is not page-locked."""
    monkeypatch.setattr(backend, "gpu_operator", lambda device: interpreted_operator())
    monkeypatch.setattr(host_tier, "_register", lambda memory: True)
    model: Any = load_package(folder, slots=(3,), cache_policy="lru")
    one = model.conmoe
    nbytes = records * one.manifest.layouts[0].nbytes
    numbers = list(range(len(one.manifest.prototypes)))
    one.backend.host = HostCompute(HostTier(one._store, numbers, nbytes), one.manifest)
    one.backend.host.costs = costs
    return model


def output_of(model: Any, row: list[int]) -> torch.Tensor:
    """Of the first layer's experts for one token and these slots."""
    _, module = next(iter(find_experts(model).values()))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    gates = torch.linspace(0.2, 0.5, len(row)).unsqueeze(0)
    with torch.inference_mode():
        return module(x, torch.tensor([row]), gates)


HALF = MissCosts(copy=1.0, compute=1.0, detour=0.0)


def test_some_are_computed_where_they_lie(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = load_package(package)
    model = with_host_memory(package, monkeypatch, records=24, costs=HALF)
    one = model.conmoe
    one.residency.visit([20, 21, 22], lambda positions, experts: None)  # nothing of this layer
    one.reset_stats()
    found = output_of(model, [0, 1, 2, 3])
    assert torch.allclose(
        found.float(), output_of(plain, [0, 1, 2, 3]).float(), rtol=2e-2, atol=2e-3
    )
    stats = one.stats()
    assert (stats.host_computed, stats.misses, stats.hits) == (2, 4, 0)
    assert stats.bytes_read == 2 * one.manifest.layouts[0].nbytes, "two were brought"
    assert one.residency.table.place(0) is None and one.residency.table.present([3]), (
        "the numbers break ties"
    )
    # What was brought is there for the next token.
    again = output_of(model, [2, 3, 2, 3])
    assert one.stats().host_computed == 2 and one.stats().hits == 2
    assert torch.allclose(
        again.float(), output_of(plain, [2, 3, 2, 3]).float(), rtol=2e-2, atol=2e-3
    )
    one.reset_stats()
    assert one.stats().host_computed == one.stats().misses == 0


def test_all_of_them_and_nothing_brought(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = load_package(package)
    never = MissCosts(copy=1.0, compute=0.0, detour=0.0)
    model = with_host_memory(package, monkeypatch, records=24, costs=never)
    model.conmoe.residency.visit([20, 21, 22], lambda positions, experts: None)
    model.conmoe.reset_stats()
    found = output_of(model, [4, 5, 6])
    assert torch.allclose(found.float(), output_of(plain, [4, 5, 6]).float(), rtol=2e-2, atol=2e-3)
    stats = model.conmoe.stats()
    assert (stats.host_computed, stats.bytes_read) == (3, 0)


def test_what_is_on_the_disk_is_brought(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = MissCosts(copy=1.0, compute=0.0, detour=0.0)
    model = with_host_memory(package, monkeypatch, records=2, costs=never)
    model.conmoe.residency.visit([20, 21, 22], lambda positions, experts: None)
    model.conmoe.reset_stats()
    output_of(model, [0, 1, 2, 3])
    assert model.conmoe.stats().host_computed == 2
    assert model.conmoe.residency.table.present([2, 3])


def test_costs_are_measured_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_host_memory(package, monkeypatch, records=24, costs=HALF)
    host = model.conmoe.backend.host
    host.costs = None
    _, module = next(iter(find_experts(model).values()))
    x = torch.ones(1, 64).bfloat16()
    assert host.choose(module, [], x) == [] and host.costs is None
    chosen = host.choose(module, [5, 6], x)
    assert set(chosen) <= {5, 6} and host.computed == 0
    costs = host.costs
    assert costs is not None and min(costs.copy, costs.compute, costs.detour) > 0
    host.choose(module, [7], x)
    assert host.costs is costs


def test_the_heavier_ones_are_brought(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_host_memory(package, monkeypatch, records=24, costs=HALF)
    _, module = next(iter(find_experts(model).values()))
    assert getattr(module, HANDLE).slots.slot_map.layer == 0
    # Layer by layer the prototypes of this package weigh more.
    chosen = model.conmoe.backend.host.choose(module, [17, 3, 9, 1], torch.ones(1, 64).bfloat16())
    assert chosen == [1, 3]
