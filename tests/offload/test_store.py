"""Records from disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from conmoe_edge.checkpoint.manifest import ExpertId, PrototypeEntry, RecordLayout
from conmoe_edge.errors import PackageError
from conmoe_edge.offload import store as store_module
from conmoe_edge.offload.slots import host_buffer
from conmoe_edge.offload.store import RecordStore

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


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, entries = _files(tmp_path, 1)
    calls = []

    def one_page(handle: int, buffer: memoryview, offset: int, lock: object) -> int:
        calls.append(offset)
        return os.preadv(handle, [buffer[:1000]], offset)

    monkeypatch.setattr(store_module, "_read_at", one_page)
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
