"""Residency with real files, threads and slots: orders of compute, the short way, scans, prefetch, failures."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.errors import PackageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.compute.cpu_layer import CpuBackend, HostAddresses
from conmoe_edge.offload.compute.torch_backend import Arithmetic
from conmoe_edge.offload.kernels.cpu.bindings import operator
from conmoe_edge.offload.residency.policies import POLICIES
from conmoe_edge.offload.residency.residency import Residency
from conmoe_edge.offload.simulate.load_settings import settings_for
from conmoe_edge.offload.storage.record_store import RecordStore
from conmoe_edge.offload.storage.slot_pool import SlotPool
from conmoe_edge.offload.storage.transfer import DirectTransfer
from tests.families import tiny_model
from tests.hand_packages import identity, write_package
from tests.patience import PATIENCE, wait_for

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9, 41, 27]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe")
    return write_package(plain, tmp_path_factory.mktemp("package"), identity(plain))


class Bench:
    """A residency of a package without a model, and the records as they should be."""

    def __init__(self, folder: Path, slots: int, policy: str | None = "lru") -> None:
        manifest = load_manifest(folder)
        self.store = RecordStore(folder, manifest.prototypes, manifest.layouts)
        self.transfer = DirectTransfer(self.store)
        pools = [SlotPool(layout, slots, CPU) for layout in manifest.layouts]
        settings = settings_for(folder, manifest, (slots,), policy)
        self.residency = Residency(manifest, pools, self.transfer, settings)
        self.addresses = HostAddresses(self.residency)
        self.residency.preload()
        self.cache: Any = self.residency._caches[0]
        self.count = len(manifest.prototypes)
        self.pool = pools[0]

    def holds(self, number: int) -> bool:
        """Whether the slot has the very bytes of the prototype's record."""
        right = torch.empty(self.pool.layout.nbytes, dtype=torch.uint8)
        self.store.read_into(number, right)
        slot = self.cache.slot_of(number)
        return slot is not None and torch.equal(self.pool.record(slot), right)

    def settle(self) -> None:
        """Until every prefetch is over, whatever became of it."""
        wait_for(
            lambda: all(
                self.transfer.ready((0, self.cache.slot_of(n))) for n in self.cache.arriving
            )
        )

    def visit(self, numbers: list[int], *, scan: bool = False) -> list[int]:
        """Positions in the order of compute; every expert is checked against the disk."""
        seen: list[int] = []

        def compute(positions: Sequence[int], experts: Sequence[Any]) -> None:
            assert len(positions) == 1 or not scan or self.residency.all_resident
            for position, expert in zip(positions, experts, strict=True):
                assert self.holds(numbers[position])
                assert expert is self.pool.parts(self.cache.slot_of(numbers[position]))
            seen.extend(positions)

        self.residency.visit(numbers, compute, scan=scan)
        self.check_addresses()
        return seen

    def check_addresses(self) -> None:
        """What the operator sees is what the cache knows of and has come, with the right bytes."""
        if operator() is None:
            return
        there = {n for n in range(self.count) if n in self.addresses.table}
        assert there == self.cache.resident - self.cache.arriving
        assert all(self.holds(number) for number in there)

    def close(self) -> None:
        self.residency.close()
        self.transfer.close()
        self.store.close()


@pytest.fixture
def bench(folder: Path) -> Iterator[Bench]:
    one = Bench(folder, 6)
    yield one
    one.close()


def test_decode_computes_what_is_there_first(bench: Bench) -> None:
    assert sorted(bench.cache.resident) == list(range(6))
    assert bench.visit([3, 8, 4, 9]) == [0, 2, 1, 3]
    assert (bench.residency.hits, bench.residency.misses) == (2, 2)


def test_a_scan_computes_in_order_at_any_number_of_slots(folder: Path) -> None:
    for slots in (1, 2, 7, 24):
        bench = Bench(folder, slots)
        everything = list(range(bench.count))
        for _ in range(3):
            assert bench.visit(everything, scan=True) == everything
        if slots > 2:
            assert bench.residency.hits >= 3 * (slots - bench.cache.ring)
        bench.close()


def test_the_short_way_is_counted_as_use(bench: Bench) -> None:
    found = bench.residency.resident([1, 2])
    assert found is not None and bench.residency.hits == 2
    assert [
        e is bench.pool.parts(bench.cache.slot_of(n)) for e, n in zip(found, (1, 2), strict=True)
    ] == [True, True]
    assert bench.residency.resident([1, 20]) is None
    assert bench.residency.hits == 2, "what is refused is not counted"
    bench.visit([20, 21, 22, 23])  # the four that were used longest ago give way
    assert {1, 2} <= bench.cache.resident


def test_prefetch_brings_what_it_says(bench: Bench) -> None:
    bench.residency.prefetch([10, 11, 2])
    assert bench.residency.bytes_read == 8 * bench.pool.layout.nbytes
    bench.settle()
    bench.visit([10, 2, 11])
    assert (bench.residency.hits, bench.residency.misses) == (3, 0)
    assert bench.residency.prefetched == (2, 2)


class Gate:
    """Lets reads of a store wait until ``open`` is set."""

    def __init__(self, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        read = store.read_into

        def later(number: int, target: torch.Tensor) -> None:
            assert self.open.wait(PATIENCE)
            read(number, target)

        monkeypatch.setattr(store, "read_into", later)


def test_prefetch_waits_for_demand_reads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(bench.store, monkeypatch)
    seen: list[tuple[int, bool]] = []

    def compute(positions: Sequence[int], experts: Sequence[Any]) -> None:
        bench.residency.prefetch([15])
        seen.append((positions[0], bench.cache.slot_of(15) is not None))
        gate.open.set()

    bench.residency.visit([0, 12, 13], compute)
    assert seen[0] == (0, False), "two reads of this layer are still under way"
    assert seen[-1][1]
    bench.settle()
    assert bench.visit([15]) == [0]
    assert bench.residency.prefetched == (1, 1)


def test_what_has_come_computes_together(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(bench.store, monkeypatch)
    turns: list[list[int]] = []

    def compute(positions: Sequence[int], experts: Sequence[Any]) -> None:
        assert all(bench.holds(numbers[position]) for position in positions if turns)
        turns.append(list(positions))
        gate.open.set()
        for number in numbers:  # until both reads are over
            while not bench.transfer.ready((0, bench.cache.slot_of(number))):
                time.sleep(0.001)

    numbers = [9, 3, 8, 4]
    bench.residency.visit(numbers, compute)
    assert turns == [[1, 3], [0, 2]], "what is there, then the two that were read meanwhile"


def test_all_reads_are_begun_before_anything_is_waited_for_or_computed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read a miss, whatever comes together."""
    told: list[tuple[str, int]] = []
    load, wait = bench.transfer.load, bench.transfer.wait

    def loading(number: int, *args: Any, **kwargs: Any) -> None:
        told.append(("load", number))
        load(number, *args, **kwargs)

    def waiting(place: Any) -> None:
        told.append(("wait", place[1]))
        wait(place)

    monkeypatch.setattr(bench.transfer, "load", loading)
    monkeypatch.setattr(bench.transfer, "wait", waiting)

    def compute(positions: Sequence[int], experts: Sequence[Any]) -> None:
        told.append(("compute", len(positions)))

    bench.residency.visit([9, 1, 12, 3, 20], compute)
    assert told[:3] == [("load", 9), ("load", 12), ("load", 20)]
    kinds = [kind for kind, _ in told[3:]]
    assert "load" not in kinds and kinds.count("wait") == 5
    assert (bench.residency.hits, bench.residency.misses) == (2, 3)


def test_a_compute_that_fails_leaves_nothing_half_read(bench: Bench) -> None:
    def fail(positions: Sequence[int], experts: Sequence[Any]) -> None:
        raise RuntimeError("no memory")

    for numbers in ([9], [0, 10, 11], [20, 21, 22, 23]):
        with pytest.raises(RuntimeError, match="no memory"):
            bench.residency.visit(numbers, fail)
        bench.check_addresses()
    assert sorted(bench.visit([9, 10, 11])) == [0, 1, 2]


@pytest.mark.skipif(operator() is None, reason="no compiler here")
def test_what_the_operator_sees_after_prefetches_and_shrinking(bench: Bench) -> None:
    bench.residency.prefetch([10, 11, 12])
    bench.check_addresses()  # none of them, as long as nobody has looked
    bench.settle()
    bench.residency.collect()
    bench.check_addresses()
    assert 10 in bench.addresses.table
    bench.residency.shrink([3])
    bench.check_addresses()
    assert len(bench.cache.resident) == 3
    bench.residency.close()
    assert not any(number in bench.addresses.table for number in range(bench.count))


def test_a_prefetch_that_fails_is_told_to_whoever_asks(folder: Path, tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    bench = Bench(write_package(plain, tmp_path, identity(plain)), 6)
    file = tmp_path / "prototypes-00001-of-00001.safetensors"
    data = file.read_bytes()
    with file.open("r+b") as handle:
        handle.truncate(len(data) // 2)
    bench.residency.prefetch([bench.count - 1])
    bench.settle()
    bench.residency.resident([0])  # notices, and says nothing
    with pytest.raises(PackageError, match="ends before byte"):
        bench.residency.visit([bench.count - 1], lambda positions, experts: None)
    with file.open("r+b") as handle:
        handle.write(data)
    assert bench.visit([bench.count - 1]) == [0]
    bench.close()


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_every_policy_gives_the_same_bits(folder: Path, policy: str | None) -> None:
    everything = load_package(folder)
    some = load_package(folder, slots=(5,), cache_policy=policy)
    with torch.no_grad():
        assert torch.equal(some(IDS).logits, everything(IDS).logits)
        for ids in IDS[0]:
            assert torch.equal(some(ids.view(1, 1)).logits, everything(ids.view(1, 1)).logits)
    assert some.conmoe.residency.settings[0].policy == (policy or "pins")


def test_a_residency_that_is_dropped_gives_its_memory_back_at_once(folder: Path) -> None:
    """Neither its views nor a backend keep it alive in a circle."""
    manifest = load_manifest(folder)
    store = RecordStore(folder, manifest.prototypes, manifest.layouts)
    transfer = DirectTransfer(store)
    pools = [SlotPool(layout, 6, CPU) for layout in manifest.layouts]
    memory = weakref.ref(pools[0]._memory.untyped_storage())  # type: ignore[union-attr]
    settings = settings_for(folder, manifest, (6,), "pins")
    residency = Residency(manifest, pools, transfer, settings)
    backend: Any = CpuBackend(CPU, residency, Arithmetic(CPU))
    residency.preload()
    gc.collect()
    gc.disable()
    try:
        del pools, residency, backend
        assert memory() is None
    finally:
        gc.enable()
    transfer.close()
    store.close()
