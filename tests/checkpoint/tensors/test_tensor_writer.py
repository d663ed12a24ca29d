"""What is written is what safetensors reads: alignment, order, hashes, shards, failures."""

from __future__ import annotations

import errno
import hashlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from conmoe_edge.checkpoint.format.layout import SMALL_RECORD
from conmoe_edge.checkpoint.fs import atomic_files as files_module
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, write_bytes, write_json
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.checkpoint.tensors.tensor_writer import (
    TensorSource,
    write_dense,
    write_records,
    write_tensors,
)
from conmoe_edge.errors import ConmoeError, NoSpace


def source(name: str, tensor: torch.Tensor) -> TensorSource:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSource(name, dtype, tuple(tensor.shape), lambda: tensor)


def records(sizes: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    """One buffer for all of them, as a run with little memory does it."""
    buffer = torch.empty(max(sizes.values()), dtype=torch.uint8)
    for number, (name, size) in enumerate(sizes.items()):
        buffer.random_(0, 256, generator=torch.Generator().manual_seed(number))
        yield name, buffer[:size]


def assert_true(written: WrittenFile, folder: Path) -> None:
    data = (folder / written.name).read_bytes()
    assert written.size == len(data)
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    assert written.entry() == {"size": written.size, "sha256": written.sha256}


@pytest.mark.parametrize("count", [1, 2, 40])
def test_records_are_aligned_and_the_library_reads_them(count: int, tmp_path: Path) -> None:
    # 40 long names make a header of more than one page.
    sizes = {f"{'layer' * 30}.{n:02d}": 4096 * (1 + n % 3) - 64 * (n // 7) for n in range(count)}
    sizes = {"large": SMALL_RECORD + 4096} | sizes
    written = write_records(tmp_path / "prototypes-00001.safetensors", sizes, records(sizes))
    assert_true(written, tmp_path)
    data = (tmp_path / written.name).read_bytes()
    assert list(written.offsets) == list(sizes)
    with safe_open(tmp_path / written.name, framework="pt") as handle:
        assert set(handle.keys()) == set(sizes)
        for name, expected in records(sizes):
            offset = written.offsets[name]
            assert offset % (4096 if name == "large" else 64) == 0
            assert torch.equal(handle.get_tensor(name), expected)
            assert data[offset : offset + sizes[name]] == expected.numpy().tobytes()
    assert written.size == min(written.offsets.values()) + sum(sizes.values())


def test_the_same_records_give_the_same_file(tmp_path: Path) -> None:
    sizes = {"b": 4096, "a": 8192}
    first = write_records(tmp_path / "p.safetensors", sizes, records(sizes))
    assert write_records(tmp_path / "p.safetensors", sizes, records(sizes)) == first


@pytest.mark.parametrize(
    ("sizes", "given"),
    [
        ({"a": 4095}, ["a"]),
        ({"a": SMALL_RECORD + 64}, ["a"]),
        ({"a": 64, "b": SMALL_RECORD}, ["a", "b"]),
        ({"a": 0}, ["a"]),
        ({"a": 4096, "b": 4096}, ["a"]),
        ({"a": 4096, "b": 4096}, ["b", "a"]),
        ({"a": 4096}, ["a", "b"]),
        ({"a": 8192}, ["a"]),
    ],
)
def test_records_other_than_announced(
    sizes: dict[str, int], given: list[str], tmp_path: Path
) -> None:
    stream = ((name, torch.zeros(4096, dtype=torch.uint8)) for name in given)
    with pytest.raises(ValueError):
        write_records(tmp_path / "p.safetensors", sizes, stream)
    assert not list(tmp_path.glob("*.tmp"))


def test_dense_shards_and_their_index(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    index = CheckpointIndex.open(sharded)
    with ShardReader(index) as reader:
        written = write_dense(
            out, [TensorSource.of(reader[name]) for name in reader], max_shard_bytes=140
        )
        assert [file.name for file in written] == [
            "dense-00001-of-00002.safetensors",
            "dense-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ]
        for file in written:
            assert_true(file, out)
        copy = CheckpointIndex.open(out)
        assert set(copy.tensors) == set(index.tensors)
        assert copy.total_bytes == index.total_bytes
        with ShardReader(copy) as again:
            for name in reader:
                assert torch.equal(again[name][...], reader[name][...])
                assert again[name].dtype == reader[name].dtype
    total = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]
    assert total == {"total_size": index.total_bytes}


def test_every_tensor_is_aligned_to_its_own_format(tmp_path: Path) -> None:
    tensors = {
        "byte": torch.ones(3, dtype=torch.uint8),
        "wide": torch.ones(2, dtype=torch.float64),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.ones(0, 4),
        "scalar": torch.tensor(3.5),
    }
    written = write_tensors(
        tmp_path / "t.safetensors", [source(name, tensor) for name, tensor in tensors.items()]
    )
    with safe_open(tmp_path / "t.safetensors", framework="pt") as handle:
        for name, tensor in tensors.items():
            assert written.offsets[name] % tensor.element_size() == 0
            assert torch.equal(handle.get_tensor(name), tensor)


def test_one_tensor_at_a_time_is_held(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def load() -> torch.Tensor:
        nonlocal most
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    sources = [TensorSource(f"t{n}", "float32", (1000,), load) for n in range(6)]
    write_tensors(tmp_path / "t.safetensors", sources)
    assert len(alive) == 6 and most <= 2


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2, 2), torch.ones(4).half()])
def test_tensor_that_is_not_what_was_announced(wrong: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="t is"):
        write_tensors(
            tmp_path / "t.safetensors", [TensorSource("t", "float32", (4,), lambda: wrong)]
        )
    assert list(tmp_path.iterdir()) == []


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="called 't'"):
        write_tensors(tmp_path / "t.safetensors", [source("t", torch.ones(1))] * 2)


def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.safetensors"
    sizes = {"a": 4096}
    write_records(path, sizes, records(sizes))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("conmoe_edge.checkpoint.tensors.tensor_writer._write", full)
    with pytest.raises(NoSpace) as caught:
        write_records(path, sizes, records(sizes))
    assert "same command" in caught.value.fix
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_really_full_disk(tmp_path: Path) -> None:
    """The kernel itself refuses to let the file grow: no mock in between."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        sizes = {"a": 2 << 20}
        with pytest.raises(NoSpace):
            write_records(tmp_path / "p.safetensors", sizes, records(sizes))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConmoeError) as caught:
        write_bytes(tmp_path / "no" / "file", b"x")
    assert "--out" in caught.value.fix


def test_content_is_synced_before_the_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def recorded(name: str) -> Any:
        real = getattr(files_module.durable, name)

        def call(path: Path, *rest: Path) -> None:
            steps.append(f"{name} {path.name}")
            real(path, *rest)

        return call

    for name in ("fsync_file", "replace", "fsync_folder"):
        monkeypatch.setattr(files_module.durable, name, recorded(name))
    write_bytes(tmp_path / "x", b"1")
    assert steps == ["fsync_file x.tmp", "replace x.tmp", f"fsync_folder {tmp_path.name}"]


def test_json_bytes_do_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    first = write_json(tmp_path / "a.json", {"b": 1, "a": [1, 2]})
    second = write_json(tmp_path / "b.json", {"a": [1, 2], "b": 1})
    assert first.sha256 == second.sha256
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, 2], "b": 1}
