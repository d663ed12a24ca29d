"""The two measurements on this machine, and the day that they are kept."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from conmoe_edge.memory import bandwidth
from conmoe_edge.memory.bandwidth import (
    CACHE_DIR_VARIABLE,
    Meter,
    disk_bandwidth,
    memory_bandwidth,
    nearest_folder,
    threads,
)
from conmoe_edge.memory.machine import measure_machine
from conmoe_edge.memory.resolve import resolve_budget

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "bandwidth.json"


def _counted(monkeypatch, name, value):
    """The measurement ``name`` gives ``value``; how often it ran."""
    runs = []
    monkeypatch.setattr(bandwidth, name, lambda *a: runs.append(a) or value)
    return runs


def test_memory_is_read_at_some_speed():
    assert 1 <= threads() <= (os.cpu_count() or 1)
    assert 0 < (memory_bandwidth(16 * MIB, seconds=0.02) or 0) < 1e13


def test_a_folder_without_large_files_is_measured_with_a_file_that_is_gone_afterwards(tmp_path):
    (tmp_path / "small").write_bytes(b"x" * 10)
    assert (disk_bandwidth(tmp_path, seconds=0.02) or 0) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_large_file_is_read_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bandwidth.tempfile, "TemporaryFile", lambda **k: pytest.fail("nothing is to be written")
    )
    data = os.urandom(MIB) * 20
    (tmp_path / "records").write_bytes(data)
    assert (disk_bandwidth(tmp_path, 256 << 10, seconds=0.02) or 0) > 0
    assert (tmp_path / "records").read_bytes() == data


@pytest.mark.parametrize("block", [1, 4097, 300_000])
def test_any_record_size_can_be_asked_for(tmp_path, block):
    (tmp_path / "records").write_bytes(os.urandom(MIB) * 17)
    assert (disk_bandwidth(tmp_path, block, seconds=0.02) or 0) > 0


def test_where_nothing_can_be_read_or_written_there_is_no_figure(tmp_path, monkeypatch):
    def refused(**more):
        raise PermissionError

    monkeypatch.setattr(bandwidth.tempfile, "TemporaryFile", refused)
    assert disk_bandwidth(tmp_path) is None
    assert Meter(tmp_path).disk() is None


def test_the_nearest_folder(tmp_path):
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").write_text("x")
    assert nearest_folder(tmp_path / "file") == tmp_path


def test_a_figure_is_kept_for_a_day(tmp_path, cache, monkeypatch):
    runs = _counted(monkeypatch, "memory_bandwidth", 20e9)
    assert Meter(tmp_path).memory() == Meter(tmp_path).memory() == 20e9
    assert len(runs) == 1
    known = json.loads(cache.read_text())
    assert [one["bytes_per_second"] for one in known.values()] == [20_000_000_000]
    for one in known.values():
        one["measured"] -= 25 * 3600
    cache.write_text(json.dumps(known))
    Meter(tmp_path).memory()
    assert len(runs) == 2
    Meter(tmp_path, fresh=True).memory()
    assert len(runs) == 3


def test_disks_and_record_sizes_are_kept_apart(tmp_path, monkeypatch):
    runs = _counted(monkeypatch, "disk_bandwidth", 1e9)
    (tmp_path / "a").mkdir()
    assert Meter(tmp_path).disk() == Meter(tmp_path / "a").disk() == 1e9
    assert len(runs) == 1
    Meter(tmp_path, block=8192).disk()
    assert len(runs) == 2


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"memory-1": 3}', '{"memory-1": {"bytes_per_second": "x"}}', "\0"]
)
def test_a_damaged_cache_is_measured_again(tmp_path, cache, monkeypatch, content):
    monkeypatch.setattr(bandwidth, "threads", lambda: 1)
    _counted(monkeypatch, "memory_bandwidth", 5e9)
    cache.parent.mkdir()
    cache.write_text(content)
    assert Meter(tmp_path).memory() == 5e9
    assert json.loads(cache.read_text())["memory-1"]["bytes_per_second"] == 5e9


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, cache, monkeypatch):
    _counted(monkeypatch, "memory_bandwidth", 5e9)
    cache.parent.write_text("a file where the folder should be")
    assert Meter(tmp_path).memory() == 5e9


def test_a_budget_like_this_machine_gets_its_bandwidths(tmp_path, monkeypatch):
    memory = _counted(monkeypatch, "memory_bandwidth", 20e9)
    disk = _counted(monkeypatch, "disk_bandwidth", 1e9)
    for asked in ("1GB", "auto"):
        budget = resolve_budget(asked, "cpu", meter=Meter(tmp_path))
        assert budget.device_bandwidth == 20e9
        assert budget.disk_bandwidth == budget.link_bandwidth == 1e9
    assert (len(memory), len(disk)) == (1, 1)
    assert resolve_budget("1GB", "cpu").device_bandwidth is None
    profile = resolve_budget("cpu-16gb", meter=Meter(tmp_path, fresh=True))
    assert profile.disk_bandwidth == 2e9  # a profile says what its own machine can do
    other = replace(measure_machine(), gpu=None)
    target = resolve_budget("8GB", "cuda", facts=other, meter=Meter(tmp_path, fresh=True))
    assert target.device_bandwidth is target.disk_bandwidth is None
    assert (len(memory), len(disk)) == (1, 1)
