"""The runtime: accounting, damage, retreat."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.errors import OutOfMemory, PackageError, UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.experts import find_experts
from conmoe_edge.offload import runtime as runtime_module
from conmoe_edge.offload.storage.slot_pool import SlotPool
from tests.families import tiny_model
from tests.hand_packages import identity, thirds, write_package

IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9, 41, 27]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe")
    return write_package(plain, tmp_path_factory.mktemp("package"), identity(plain))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_counts_are_what_was_asked_and_read(folder: Path) -> None:
    model = load_package(folder, slots=(1,))
    runtime = model.conmoe
    runtime.reset_stats()
    asked: list[int] = []
    visit = runtime.residency.visit
    runtime.residency.visit = lambda numbers, compute, **how: (
        asked.extend(numbers),
        visit(numbers, compute, **how),
    )
    _logits(model)
    stats = runtime.stats()
    repeated = sum(first == second for first, second in pairwise(asked))
    assert stats.hits + stats.misses == len(asked)
    # One slot: only what was computed just before can be there; before the first, prototype 0 was.
    assert stats.hits == repeated + (asked[0] == 0)
    assert stats.bytes_read == stats.misses * runtime.manifest.layouts[0].nbytes
    assert stats.disk_bytes == stats.bytes_read and stats.host_bytes == 0
    assert stats.waited_seconds >= 0 and stats.read_mode == "buffered"
    assert stats.policy and stats.kernel
    runtime.reset_stats()
    assert runtime.stats().disk_bytes == 0 == runtime.stats().waited_seconds


def test_all_resident_reads_each_record_once(folder: Path) -> None:
    model = load_package(folder)
    stats = model.conmoe.stats()
    assert stats.resident_share == 1 and stats.hits == stats.misses == 0
    assert stats.bytes_read == stats.prototypes * model.conmoe.manifest.layouts[0].nbytes
    _logits(model)
    again = model.conmoe.stats()
    assert again.bytes_read == stats.bytes_read and again.misses == 0 and again.hits > 0
    assert again.hit_rate == 1


def test_the_heaviest_prototypes_are_pinned(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    layer = min(find_experts(plain))
    heavy = {ExpertId(layer, 3): 0.9, ExpertId(layer, 0): 0.8, ExpertId(layer, 6): 0.1}
    model = load_package(write_package(plain, tmp_path, thirds(plain), weights=heavy), slots=(4,))
    numbers = [
        i
        for i, entry in enumerate(model.conmoe.manifest.prototypes)
        if entry.id in (ExpertId(layer, 0), ExpertId(layer, 3))
    ]
    _logits(model)
    cache = model.conmoe.residency._caches[0]
    assert cache is not None and cache.pinned == set(numbers)
    assert cache.pinned <= cache.resident


def test_closed_runtime_says_so(folder: Path) -> None:
    model = load_package(folder)
    model.conmoe.close()
    model.conmoe.close()
    with pytest.raises(UsageError, match="not loaded"):
        _logits(model)


def test_a_record_that_vanishes_while_running(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    model = load_package(write_package(plain, tmp_path, identity(plain)), slots=(2,))
    whole = _logits(model)
    file = tmp_path / "prototypes-00001-of-00001.safetensors"
    data = file.read_bytes()
    with file.open("r+b") as handle:
        handle.truncate(len(data) // 2)
    for _ in range(2):
        with pytest.raises(PackageError, match="ends before byte"):
            _logits(model)
    with file.open("r+b") as handle:
        handle.write(data)
    assert torch.equal(_logits(model), whole), (
        "a read that failed must not count as a resident prototype"
    )


def test_retreat_gives_up_half_the_slots_and_changes_nothing(folder: Path) -> None:
    model = load_package(folder)
    whole = _logits(model)
    seen = [model.conmoe.stats().slots]
    read = model.conmoe.stats().bytes_read
    while model.conmoe.retreat():
        seen.append(model.conmoe.stats().slots)
        assert torch.equal(_logits(model), whole)
        assert model.conmoe.stats().bytes_read > read, "counters go on"
    assert seen == [24, 12, 6, 3, 1]


def test_slots_that_cannot_be_had_are_fewer_slots(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(layout: Any, slots: int, device: torch.device) -> SlotPool:
        if slots > 5:
            raise OutOfMemory("no memory")
        return SlotPool(layout, slots, device)

    whole = _logits(load_package(folder))
    monkeypatch.setattr(runtime_module, "SlotPool", scarce)
    model = load_package(folder)
    assert model.conmoe.stats().slots == 3
    assert torch.equal(_logits(model), whole)


def test_no_memory_for_a_single_slot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(layout: Any, slots: int, device: torch.device) -> SlotPool:
        raise OutOfMemory("no memory")

    monkeypatch.setattr(runtime_module, "SlotPool", none)
    with pytest.raises(OutOfMemory):
        load_package(folder)


def test_progress_counts_records(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_package(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 24) for i in range(1, 25)]


def test_slots_are_aligned(folder: Path) -> None:
    model = load_package(folder)
    pool = model.conmoe.residency.pools[0]
    for slot in range(pool.slots):
        assert pool.record(slot).data_ptr() % 64 == 0
        assert all(part.data_ptr() % 64 == 0 for part in pool.parts(slot).parts.values())


def test_a_retreat_that_fails_leaves_a_runtime_that_tries_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(layout: Any, slots: int, device: torch.device) -> SlotPool:
        raise OutOfMemory("no memory")

    model = load_package(folder)
    expected = _logits(model)
    with monkeypatch.context() as patch:
        patch.setattr(runtime_module, "SlotPool", none)
        assert not model.conmoe.retreat()
        assert model.conmoe.stats().slots == 0
        with pytest.raises(OutOfMemory, match="fewest cache slots"):
            _logits(model)
    assert torch.equal(_logits(model), expected)
    assert model.conmoe.stats().slots == 1
    model.conmoe.close()
    with pytest.raises(UsageError, match="not loaded"):
        _logits(model)
