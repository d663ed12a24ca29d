"""Records from disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conmoe_edge.checkpoint.format.layout import SMALL_RECORD
from conmoe_edge.checkpoint.format.manifest import ExpertId, PrototypeEntry, RecordLayout
from conmoe_edge.errors import PackageError
from conmoe_edge.offload.storage import read_mode
from conmoe_edge.offload.storage import record_store as store_module
from conmoe_edge.offload.storage.read_mode import choose_read_mode
from conmoe_edge.offload.storage.record_store import RecordStore
from conmoe_edge.offload.storage.slot_pool import host_buffer

LAYOUT = RecordLayout("source", (), 8192)


def _files(folder: Path, records: int) -> tuple[bytes, list[PrototypeEntry]]:
    data = os.urandom(4096 + records * LAYOUT.nbytes)
    (folder / "p.bin").write_bytes(data)
    entries = [
        PrototypeEntry(ExpertId(0, i), "p.bin", 4096 + i * LAYOUT.nbytes, 0, 0.0)
        for i in range(records)
    ]
    return data, entries


@pytest.mark.parametrize("keep_cached", [True, False])
def test_reads_whole_records(tmp_path: Path, keep_cached: bool) -> None:
    data, entries = _files(tmp_path, 3)
    store = RecordStore(tmp_path, entries, [LAYOUT], keep_cached=keep_cached)
    target = host_buffer(LAYOUT.nbytes)
    for number in (2, 0, 1):
        store.read_into(number, target)
        start = entries[number].offset
        assert bytes(target.numpy()) == data[start : start + LAYOUT.nbytes]
    store.close()


def _direct(folder: Path, entries: list[PrototypeEntry]) -> RecordStore:
    store = RecordStore(folder, entries, [LAYOUT])
    if not store.read_direct():
        pytest.skip("no direct reads on this file system")
    return store


def test_direct_reads_bring_the_same_bytes(tmp_path: Path) -> None:
    data, entries = _files(tmp_path, 3)
    store = _direct(tmp_path, entries)
    target = host_buffer(LAYOUT.nbytes)
    for number in (2, 0, 1):
        store.read_into(number, target)
        start = entries[number].offset
        assert bytes(target.numpy()) == data[start : start + LAYOUT.nbytes]
    assert store.mode == "direct"


def test_a_large_record_that_is_not_aligned_is_read_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SMALL_RECORD", LAYOUT.nbytes)
    data, entries = _files(tmp_path, 2)
    store = _direct(tmp_path, entries)
    monkeypatch.setattr(store, "_by_pages", None)
    target = host_buffer(LAYOUT.nbytes + 4096)[64 : 64 + LAYOUT.nbytes]
    store.read_into(1, target)
    assert bytes(target.numpy()) == data[entries[1].offset : entries[1].offset + LAYOUT.nbytes]
    assert store.mode == "direct", "one odd buffer is no reason to give up"


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("keep_cached", [False, True])
def test_small_records_share_pages(tmp_path: Path, direct: bool, keep_cached: bool) -> None:
    """Also at the end of a file, whose last page is not whole, and with a large record among them."""
    layouts = [RecordLayout("source", (), nbytes) for nbytes in (SMALL_RECORD, 64, 3 * 4096 + 192)]
    entries, end = [], 4096
    for number, layout in enumerate([0, 2, 1, 2, 1, 1, 2]):
        entries.append(PrototypeEntry(ExpertId(0, number), "p.bin", end, layout, 0.0))
        end += layouts[layout].nbytes
    data = os.urandom(end)
    (tmp_path / "p.bin").write_bytes(data)
    store = RecordStore(tmp_path, entries, layouts, keep_cached=keep_cached)
    if direct and not store.read_direct():
        pytest.skip("no direct reads on this file system")
    for number in (6, 0, 3, 1, 2, 5, 4):
        nbytes, offset = store.record_bytes(number), entries[number].offset
        target = host_buffer(nbytes + 64)[64:]
        store.read_into(number, target)
        assert bytes(target.numpy()) == data[offset : offset + nbytes]
    assert store.mode == ("direct" if direct else "buffered")
    (tmp_path / "p.bin").write_bytes(data[:-1])
    with pytest.raises(PackageError, match="ends before byte"):
        store.read_into(6, target[:64].new_zeros(store.record_bytes(6)))


def test_small_records_are_read_by_their_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directly where that works, which the handles tell; else through the cache, whatever went wrong."""
    layout = RecordLayout("source", (), 192)
    data = os.urandom(4096 + 100 * 192)
    (tmp_path / "p.bin").write_bytes(data)
    entries = [PrototypeEntry(ExpertId(0, i), "p.bin", 4096 + i * 192, 0, 0.0) for i in range(100)]
    store = RecordStore(tmp_path, entries, [layout])
    if not store.read_direct():
        pytest.skip("no direct reads on this file system")
    direct, calls = set(store._direct.values()), []
    failing = [0]

    def read(handle: int, buffer: memoryview, offset: int, lock: object) -> int:
        calls.append((handle in direct, offset % 4096, len(buffer) % 4096))
        if handle in direct and failing[0]:
            raise OSError(failing[0], "no")
        return os.preadv(handle, [buffer], offset)

    monkeypatch.setattr(store_module, "read_at", read)
    target = torch.zeros(192, dtype=torch.uint8)
    for failing[0], mode, ways in (
        (0, "direct", [True]),
        (errno.EIO, "direct", [True, False]),
        (errno.EINVAL, "buffered", [True, False]),
    ):
        calls.clear()
        store.read_into(42, target.zero_())
        assert bytes(target.numpy()) == data[entries[42].offset :][:192]
        assert [way for way, _, _ in calls] == ways and calls[0][1:] == (0, 0)
        assert store.mode == mode


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_refused_direct_read_is_read_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    data, entries = _files(tmp_path, 2)
    store = _direct(tmp_path, entries)
    direct = set(store._direct.values())

    def refuse(handle: int, buffer: memoryview, offset: int, lock: object) -> int:
        if handle in direct:
            raise OSError(code, "no")
        return os.preadv(handle, [buffer], offset)

    monkeypatch.setattr(store_module, "read_at", refuse)
    target = host_buffer(LAYOUT.nbytes)
    store.read_into(1, target)
    assert bytes(target.numpy()) == data[entries[1].offset : entries[1].offset + LAYOUT.nbytes]
    assert store.mode == ("buffered" if code == errno.EINVAL else "direct")


def test_a_direct_read_of_a_file_that_ends_early(tmp_path: Path) -> None:
    data, entries = _files(tmp_path, 2)
    (tmp_path / "p.bin").write_bytes(data[:-1])
    store = _direct(tmp_path, entries)
    target = host_buffer(LAYOUT.nbytes)
    store.read_into(0, target)
    with pytest.raises(PackageError, match="ends before byte"):
        store.read_into(1, target)


def test_the_faster_way_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, entries = _files(tmp_path, 8)
    slow, now = ["buffered"], [0.0]
    read_into = RecordStore.read_into

    def timed(self: RecordStore, number: int, target: torch.Tensor) -> None:
        now[0] += 0.005 if self.mode == slow[0] else 0.001
        read_into(self, number, target)

    monkeypatch.setattr(RecordStore, "read_into", timed)
    monkeypatch.setattr(read_mode, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(read_mode, "WORTH_MEASURING", 0)
    for slow[0], taken in (("buffered", "direct"), ("direct", "buffered")):
        store = RecordStore(tmp_path, entries, [LAYOUT])
        if not store.read_direct():
            pytest.skip("no direct reads on this file system")
        store.read_buffered()
        choose_read_mode(store, stays=False, spare_bytes=0)
        assert store.mode == taken


def test_files_that_fit_beside_everything_are_left_to_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, entries = _files(tmp_path, 8)
    monkeypatch.setattr(read_mode, "WORTH_MEASURING", 0)
    monkeypatch.setattr(read_mode, "_buffered_is_faster", lambda store: False)
    total = 8 * LAYOUT.nbytes
    for stays, spare, mode in (
        (False, total, "buffered"),
        (False, total - 1, "direct"),
        (True, total, "direct"),  # once is too rarely for a cache to pay
    ):
        store = RecordStore(tmp_path, entries, [LAYOUT])
        choose_read_mode(store, stays=stays, spare_bytes=spare)
        assert store.mode == mode or not store.read_direct()


def test_few_bytes_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, entries = _files(tmp_path, 2)
    monkeypatch.setattr(RecordStore, "read_into", lambda *_: pytest.fail("it read a record"))
    choose_read_mode(RecordStore(tmp_path, entries, [LAYOUT]), stays=True, spare_bytes=0)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, entries = _files(tmp_path, 1)
    calls = []

    def one_page(handle: int, buffer: memoryview, offset: int, lock: object) -> int:
        calls.append(offset)
        return os.preadv(handle, [buffer[:1000]], offset)

    monkeypatch.setattr(store_module, "read_at", one_page)
    store = RecordStore(tmp_path, entries, [LAYOUT])
    target = torch.zeros(LAYOUT.nbytes, dtype=torch.uint8)
    store.read_into(0, target)
    assert bytes(target.numpy()) == data[4096 : 4096 + LAYOUT.nbytes]
    assert calls == list(range(4096, 4096 + LAYOUT.nbytes, 1000))


def test_without_positioned_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, entries = _files(tmp_path, 2)
    store = RecordStore(tmp_path, entries, [LAYOUT])
    monkeypatch.delattr(os, "preadv")
    target = torch.zeros(LAYOUT.nbytes, dtype=torch.uint8)
    store.read_into(1, target)
    assert bytes(target.numpy()) == data[entries[1].offset : entries[1].offset + LAYOUT.nbytes]


def test_a_file_that_ends_early_is_damage(tmp_path: Path) -> None:
    data, entries = _files(tmp_path, 2)
    (tmp_path / "p.bin").write_bytes(data[:-1])
    store = RecordStore(tmp_path, entries, [LAYOUT])
    target = torch.zeros(LAYOUT.nbytes, dtype=torch.uint8)
    store.read_into(0, target)
    with pytest.raises(PackageError, match="ends before byte"):
        store.read_into(1, target)


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    _, entries = _files(tmp_path, 1)
    (tmp_path / "p.bin").unlink()
    with pytest.raises(PackageError, match=r"p\.bin"):
        RecordStore(tmp_path, entries, [LAYOUT])


def test_files_are_closed_with_the_last_reference(tmp_path: Path) -> None:
    _, entries = _files(tmp_path, 1)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    if before is None:
        pytest.skip("no /proc here")
    for _ in range(5):
        RecordStore(tmp_path, entries, [LAYOUT])
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
