"""The table of places: its rules, and that every view agrees with it after anything that can happen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conmoe_edge.checkpoint.format.manifest import CacheSettings, Manifest
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.errors import PackageError
from conmoe_edge.offload.compute.cpu_layer import HostAddresses
from conmoe_edge.offload.compute.gpu_layer import GpuAddresses
from conmoe_edge.offload.kernels.cpu.bindings import operator
from conmoe_edge.offload.residency.address_table import AddressTable
from conmoe_edge.offload.residency.policies import POLICIES, default_settings
from conmoe_edge.offload.residency.residency import Residency
from conmoe_edge.offload.storage.place import Place
from conmoe_edge.offload.storage.record_store import RecordStore
from conmoe_edge.offload.storage.slot_pool import SlotPool, can_shrink
from conmoe_edge.offload.storage.transfer import DirectTransfer
from tests.families import tiny_model
from tests.hand_packages import identity, write_package
from tests.patience import wait_for

CPU = torch.device("cpu")


class Mirror:
    """A view that remembers what it was told, and refuses what does not follow."""

    def __init__(self) -> None:
        self.places: dict[int, Place] = {}

    def put(self, number: int, place: Place) -> None:
        assert number not in self.places and place not in self.places.values()
        self.places[number] = place

    def remove(self, number: int) -> None:
        del self.places[number]


def test_a_prototype_is_absent_then_arriving_then_present() -> None:
    table, mirror = AddressTable(), Mirror()
    table.watch(mirror)
    assert table.place(3) is None and not table.present([3])
    table.assign(3, (0, 1))
    assert table.place(3) == (0, 1) and table.arriving == {3}
    assert not table.present([3]) and mirror.places == {}
    table.arrived(3)
    table.arrived(3)
    assert table.present([3]) and not table.arriving and mirror.places == {3: (0, 1)}
    assert table.free(3) == (0, 1)
    assert table.place(3) is None and not table.present([3]) and mirror.places == {}


def test_no_place_is_given_twice() -> None:
    table = AddressTable()
    table.assign(3, (0, 1))
    with pytest.raises(RuntimeError, match="prototype 4 cannot have"):
        table.assign(4, (0, 1))
    with pytest.raises(RuntimeError, match="prototype 3 cannot have"):
        table.assign(3, (0, 2))
    table.assign(4, (1, 1))
    assert table.placed(0) == {3} and table.placed(1) == {4}


def test_a_view_that_comes_later_is_told_what_is_present() -> None:
    table, mirror = AddressTable(), Mirror()
    table.assign(1, (0, 0))
    table.assign(2, (0, 1))
    table.arrived(2)
    table.watch(mirror)
    assert mirror.places == {2: (0, 1)}
    table.arrived(1)
    assert mirror.places == {1: (0, 0), 2: (0, 1)}
    table.clear()
    assert mirror.places == {} and not table.arriving


def test_what_stays_is_pinned_and_present() -> None:
    table = AddressTable()
    table.pin([1])
    for number in (1, 2):
        table.assign(number, (0, number))
        assert not table.stay([number])
        table.arrived(number)
    assert table.stay([1]) and not table.stay([2]) and not table.stay([1, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two record layouts: half of the prototypes have fewer neurons."""
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    slots = identity(plain)
    ids = [slot.prototype for row in slots.values() for slot in row]
    widths = {one: 16 for one in ids[::2] if one is not None}
    return write_package(plain, tmp_path_factory.mktemp("package"), slots, widths=widths)


class Damaged:
    """A store of which some records cannot be read for a while."""

    def __init__(self, store: RecordStore) -> None:
        self.store, self.broken = store, set[int]()

    def read_into(self, number: int, target: torch.Tensor) -> None:
        if number in self.broken:
            target.fill_(0xEE)  # half a record, say
            raise PackageError("The record cannot be read.", "", "")
        self.store.read_into(number, target)


class Bench:
    """A residency with every kind of view, and the records as they should be."""

    def __init__(self, folder: Path, planned: tuple[int, ...], lent: int, policy: str) -> None:
        self.manifest: Manifest = load_manifest(folder)
        self.store = RecordStore(folder, self.manifest.prototypes, self.manifest.layouts)
        self.damaged: Any = Damaged(self.store)
        self.transfer = DirectTransfer(self.damaged)
        self.pools = [
            SlotPool(layout, slots + lent, CPU)
            for layout, slots in zip(self.manifest.layouts, planned, strict=True)
        ]
        known: Sequence[CacheSettings] = default_settings(self.manifest, planned, policy)
        self.planned, self.count = planned, len(self.manifest.prototypes)
        self.residency = Residency(self.manifest, self.pools, self.transfer, known)
        self.table = self.residency.table
        self.mirror, self.host = Mirror(), HostAddresses(self.residency)
        self.table.watch(self.mirror)
        self.residency.preload()
        self.gpu = GpuAddresses(self.residency, CPU).table  # a view that comes afterwards

    def record(self, number: int) -> torch.Tensor:
        right = torch.empty(self.store.record_bytes(number), dtype=torch.uint8)
        self.store.read_into(number, right)
        return right

    def check(self) -> None:
        """Every view says what the table says, and the bytes are those of the prototypes."""
        present = {n for n in range(self.count) if self.table.present([n])}
        places = {n: self.table.place(n) for n in present}
        assert self.mirror.places == places and len(set(places.values())) == len(places)
        caches = list(self.residency._caches.values())
        placed = {n for cache in caches for n in cache.resident}
        assert placed == present | self.table.arriving
        assert {n for cache in caches for n in cache.arriving} == self.table.arriving
        for cache, pool in zip(caches, self.pools, strict=True):
            slots = [cache.slot_of(n) for n in cache.resident] + cache._free
            assert sorted(slots) == list(range(pool.slots)), "every slot is free or has one item"
        if operator() is not None:
            assert {n for n in range(self.count) if n in self.host.table} == present
        for number, place in places.items():
            layout, slot = place or (0, 0)
            pool = self.pools[layout]
            assert layout == self.manifest.prototypes[number].layout
            assert torch.equal(pool.record(slot), self.record(number))
            assert int(self.gpu.base[number]) == pool.record(slot).data_ptr()
            if operator() is not None:
                assert self.host.table._kept[number] == pool.parts(slot).matrices
        for number, expert in enumerate(self.residency._staying_experts):
            assert (expert is not None) == self.table.stay([number])
            if expert is not None:
                layout, slot = places[number] or (0, 0)
                assert expert is self.pools[layout].parts(slot)

    def settle(self) -> None:
        """Until every prefetch is over, whatever became of it."""
        place: Any = self.table.place
        wait_for(lambda: all(self.transfer.ready(place(n)) for n in self.table.arriving))

    def close(self) -> None:
        self.residency.close()
        assert self.mirror.places == {} and not any(self.residency._staying_experts)
        assert not any(number in self.host.table for number in range(self.count))
        self.transfer.close()
        self.store.close()


NUMBERS = st.lists(st.integers(0, 23), min_size=1, max_size=8, unique=True)


@given(data=st.data())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_the_views_agree_with_the_table_whatever_happens(folder: Path, data: st.DataObject) -> None:
    planned = (data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8)))
    lent = data.draw(st.integers(0, 3)) if can_shrink(CPU) else 0
    bench = Bench(folder, planned, lent, data.draw(st.sampled_from(POLICIES)))
    bench.check()
    for _ in range(data.draw(st.integers(1, 10))):
        what = data.draw(
            st.sampled_from(
                ["decode", "scan", "resident", "prefetch", "collect", "settle", "fail", "shrink"]
            )
        )
        numbers = data.draw(NUMBERS)
        ahead = data.draw(NUMBERS)
        broken = data.draw(st.sets(st.integers(0, 23), max_size=6))
        bench.damaged.broken = broken if data.draw(st.booleans()) else set()
        fails = what == "fail"
        seen: list[int] = []

        def compute(
            positions: Sequence[int],
            experts: Sequence[Any],
            numbers: list[int] = numbers,
            fails: bool = fails,
            seen: list[int] = seen,
        ) -> None:
            for position, expert in zip(positions, experts, strict=True):
                layout, slot = bench.table.place(numbers[position]) or (0, -1)
                assert expert is bench.pools[layout].parts(slot)
                record = bench.pools[layout].record(slot)
                assert torch.equal(record, bench.record(numbers[position]))
                assert bench.table.present([numbers[position]])
            seen.extend(positions)
            if fails:
                raise MemoryError

        if what in ("decode", "scan", "fail"):
            try:
                bench.residency.visit(numbers, compute, scan=what == "scan", ahead=ahead)
                assert sorted(seen) == list(range(len(numbers)))
            except MemoryError:
                assert fails
            except PackageError:
                assert bench.damaged.broken & set(numbers)
        elif what == "resident":
            bench.residency.resident(numbers)
        elif what == "prefetch":
            bench.residency.prefetch(ahead, keep=numbers)
        elif what == "collect":
            bench.residency.collect()
        elif what == "settle":
            bench.settle()
            bench.residency.collect()
            assert not bench.table.arriving
        elif lent:
            lent = data.draw(st.integers(0, lent))
            bench.residency.shrink([slots + lent for slots in planned])
        bench.check()
    bench.close()


def test_a_failed_prefetch_of_another_layout_is_forgotten_when_one_shrinks(folder: Path) -> None:
    """After the reads were waited for together, which of them failed is not known."""
    bench = Bench(folder, (3, 3), 1, "lru")
    layouts = bench.residency.layout_of
    absent = [n for n in range(bench.count) if layouts[n] == 1 and bench.table.place(n) is None]
    bench.damaged.broken = {absent[0]}
    bench.residency.prefetch(absent[:1])
    bench.settle()
    bench.residency.shrink([3, 4])
    assert bench.table.place(absent[0]) is None
    bench.check()
    bench.close()


def test_a_failed_prefetch_of_a_visit_that_fails_is_forgotten(folder: Path) -> None:
    bench = Bench(folder, (4, 4), 0, "lru")
    there = [n for n in range(bench.count) if bench.table.present([n])]
    absent = next(n for n in range(bench.count) if bench.table.place(n) is None)
    bench.damaged.broken = {absent}

    def fail(positions: Sequence[int], experts: Sequence[Any]) -> None:
        assert absent in bench.table.arriving
        bench.settle()
        raise MemoryError

    with pytest.raises(MemoryError):
        bench.residency.visit(there[:1], fail, ahead=[absent])
    assert bench.table.place(absent) is None
    bench.check()
    bench.close()
