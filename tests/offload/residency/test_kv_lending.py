"""Slots in the room of the key-value cache: within the plan at every token, gone before the cache grows."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.checkpoint.format.manifest import RecordLayout
from conmoe_edge.integrations import memory_plan
from conmoe_edge.integrations.load import load_package
from conmoe_edge.memory.budget import Budget
from conmoe_edge.offload.residency import quota
from conmoe_edge.offload.residency.kv_lending import Lending
from conmoe_edge.offload.residency.slot_cache import SlotCache
from conmoe_edge.offload.storage.slot_pool import SlotPool, can_shrink
from tests.families import tiny_model
from tests.hand_packages import identity, predict, write_package

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not can_shrink(CPU), reason="memory cannot be given back in parts here")


@given(
    per_token=st.integers(1, 50),
    constant=st.integers(0, 100),
    context=st.integers(1, 600),
    step=st.integers(1, 64),
    records=st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 9)), min_size=1, max_size=3),
    tokens=st.lists(st.integers(0, 600), min_size=1, max_size=8),
)
def test_slots_and_cache_never_take_more_than_the_cache_was_planned_for(
    per_token: int,
    constant: int,
    context: int,
    step: int,
    records: list[tuple[int, int]],
    tokens: list[int],
) -> None:
    def cache_bytes(held: int) -> int:
        return constant + per_token * min(held, 200)

    lending = Lending(cache_bytes, context, step, records)
    before: tuple[int, ...] | None = None
    for held in tokens:
        fewer = lending.allow(held)
        assert lending.slots is not None
        lent = sum(n * size for n, (size, _) in zip(lending.slots, records, strict=True))
        assert lent + cache_bytes(min(held, context)) <= cache_bytes(context) or lent == 0
        assert all(n <= wanted for n, (_, wanted) in zip(lending.slots, records, strict=True))
        if before is not None:
            assert all(n <= old for n, old in zip(lending.slots, before, strict=True))
            assert fewer == (lending.slots != before)
        before = lending.slots
    lending.allow(context)
    assert not any(lending.slots or ())


def test_a_cache_that_shrinks_forgets_the_places_above() -> None:
    rng = random.Random(5)
    for _ in range(50):
        planned, lent = rng.randint(2, 6), rng.randint(1, 6)
        pins = rng.sample(range(20), rng.randint(0, planned - 1))
        cache = SlotCache(planned, pins)
        cache.lend(lent)
        cache.fill([])
        for count in sorted((rng.randint(planned, planned + lent) for _ in range(3)), reverse=True):
            for _ in range(4):
                with cache.begin(rng.sample(range(20), 4), scan=rng.random() < 0.3) as one:
                    for item in list(one.needed):
                        one.loads()
                        slot = cache.slot_of(item)
                        assert slot is not None and slot < cache.slots
                        one.finish(item)
            kept = {i: cache.slot_of(i) for i in cache.resident}
            cache.shrink(count)
            expected = {i: slot for i, slot in kept.items() if slot is not None and slot < count}
            assert {i: cache.slot_of(i) for i in cache.resident} == expected
            assert set(pins) <= cache.resident
        free = cache.slots - len(cache.resident)
        assert len(cache._free) == free and all(slot < cache.slots for slot in cache._free)


def _resident_bytes(address: int) -> int:
    """Of the mappings from the one at ``address`` on, as far as they adjoin."""
    total, end = 0, None
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", block)
        size = re.search(r"(?m)^Rss:\s+(\d+) kB", block)
        if found is None or size is None:
            continue
        start = int(found[1], 16)
        if start <= address < int(found[2], 16):
            total += int(size[1]) * 1024
            end = int(found[2], 16)
    assert end is not None
    return total


@linux
def test_the_memory_really_goes_back() -> None:
    layout = RecordLayout("source", (), 1 << 20)
    pool = SlotPool(layout, 256, CPU)  # large enough for huge pages
    pool.record(100).fill_(7)
    before = _resident_bytes(pool.record(0).data_ptr())
    assert before >= 256 << 20
    pool.shrink(101)
    assert pool.nbytes == 101 << 20 and pool.slots == 101
    assert before - _resident_bytes(pool.record(0).data_ptr()) >= 155 << 20
    assert bool((pool.record(100) == 7).all()), "what stays is as it was"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe", max_position_embeddings=4096, vocab_size=512)
    return write_package(plain, tmp_path_factory.mktemp("package"), identity(plain))


def _loaded(folder: Path, planned: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A model with a budget for so many of its 24 prototypes, and one that has them all."""
    fixed = []

    def slots_for(device_bytes: int, fixed_bytes: int, records: Any) -> tuple[int, ...]:
        fixed.append(fixed_bytes)
        return quota.slots_for(device_bytes, fixed_bytes, records)

    monkeypatch.setattr(memory_plan, "slots_for", slots_for)
    whole = load_package(folder, budget=Budget("cpu", 4 << 30, "", "test"), context=2048)
    nbytes = fixed[0] + planned * whole.conmoe.manifest.layouts[0].nbytes
    return load_package(folder, budget=Budget("cpu", nbytes, "", "test"), context=2048), whole


@linux
def test_a_growing_conversation_gives_slots_back_and_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, whole = _loaded(folder, 5, monkeypatch)
    runtime = few.conmoe
    lending = runtime._lending
    assert lending is not None and runtime._slots == (5,)
    record = runtime.manifest.layouts[0].nbytes
    planned = 5 * record + lending._cache_bytes(2048)
    seen = [runtime.stats().slots]
    assert seen[0] > 5
    cache, other, ids = None, None, torch.arange(2, 102)[None]
    with torch.no_grad():
        for step in range(20):
            got = few(ids, past_key_values=cache, use_cache=True)
            expected = whole(ids, past_key_values=other, use_cache=True)
            assert torch.equal(got.logits, expected.logits)
            cache, other = got.past_key_values, expected.past_key_values
            stats = runtime.stats()
            held = sum(
                tensor.untyped_storage().nbytes()
                for layer in cache.layers
                for tensor in (layer.keys, layer.values)
            )
            assert stats.slot_bytes == stats.slots * record
            assert stats.slot_bytes + held <= planned
            seen.append(stats.slots)
            ids = (ids * 7 + step) % 512
    assert seen[-1] == 5 and len(set(seen)) > 2 and seen == sorted(seen, reverse=True)


@linux
def test_retreat_takes_the_lent_slots_first_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, _ = _loaded(folder, 6, monkeypatch)
    assert few.conmoe.stats().slots > 6
    assert few.conmoe.retreat() and few.conmoe.stats().slots == 3
    few(torch.tensor([[5, 6, 7]]))
    assert few.conmoe.stats().slots == 3


@linux
def test_reading_ahead_begins_when_the_lent_slots_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_model("olmoe", max_position_embeddings=4096, vocab_size=512)
    folder = write_package(plain, tmp_path, identity(plain))
    predict(folder, 2, 5 / 24)
    few, whole = _loaded(folder, 5, monkeypatch)
    runtime = few.conmoe
    assert runtime.residency.prefetcher is None, "it was decided for fewer slots"
    cache, other = None, None
    with torch.no_grad():
        for ids in (*([torch.arange(2, 302)[None]] * 6), *([torch.tensor([[7]])] * 8)):
            got = few(ids, past_key_values=cache, use_cache=True)
            expected = whole(ids, past_key_values=other, use_cache=True)
            cache, other = got.past_key_values, expected.past_key_values
            assert torch.equal(got.logits, expected.logits)
    assert runtime.stats().slots == 5 and runtime.residency.prefetcher is not None
    assert runtime.stats().prefetched > 0
