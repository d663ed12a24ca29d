"""Headers against the format's own library, and a corpus of what can be wrong with a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from conmoe_edge.checkpoint.fs.contained import is_plain_name
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.errors import CheckpointError, ConmoeError

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        CheckpointIndex.open(folder)
    error = caught.value
    for sentence in (error.what, error.why, error.fix):
        assert "\n" not in sentence and len(sentence) < 400
    assert error.what
    return error


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_entries_are_where_the_library_reads_them(
    kind: str, request: pytest.FixtureRequest
) -> None:
    index = CheckpointIndex.open(request.getfixturevalue(kind))
    assert list(index.tensors) == sorted(index.tensors)
    seen = 0
    for file in index.files.values():
        data = file.path.read_bytes()
        with safe_open(file.path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118, the handle is no mapping
                entry = index.tensors[name]
                expected = handle.get_tensor(name)
                assert entry.shape == tuple(expected.shape)
                assert f"torch.{entry.torch_name}" == str(expected.dtype)
                assert entry.dtype == handle.get_slice(name).get_dtype()
                raw = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
                assert data[entry.offset : entry.offset + entry.nbytes] == raw
                seen += 1
    assert seen == len(index.tensors) > 0
    assert index.total_bytes == sum(entry.nbytes for entry in index.tensors.values())


def test_an_empty_tensor_and_a_scalar_are_fine(
    single: Path, raw_file: Callable[..., bytes]
) -> None:
    header = {
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    (single / "model.safetensors").write_bytes(raw_file(header, b"\0" * 4))
    index = CheckpointIndex.open(single)
    assert index.tensors["empty"].nbytes == 0
    assert index.tensors["scalar"].shape == ()


CORPUS: dict[str, tuple[object, bytes, int | None]] = {
    "header longer than the file": ({"a": U8}, b"1234", 1 << 20),
    "header of 2^63 bytes": ({"a": U8}, b"1234", 1 << 63),
    "header of 2^64 - 1 bytes": ({"a": U8}, b"1234", (1 << 64) - 1),
    "header over the limit": ({"a": U8}, b"1234", 100_000_001),
    "header of no bytes": (b"", b"1234", None),
    "header cut in its JSON": ({"a": U8}, b"1234", 10),
    "not UTF-8": (b'{"\xff\xfe": {}}', b"", None),
    "not JSON": (b"{nonsense}", b"", None),
    "a list": (b"[1, 2]", b"", None),
    "deeply nested": (b'{"a":' * 50_000, b"", None),
    "nested list": (b"[" * 200_000, b"", None),
    "no offsets": ({"a": {"dtype": "U8", "shape": [4]}}, b"1234", None),
    "one offset": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}, b"1234", None),
    "offsets as text": (
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": ["0", "4"]}},
        b"1234",
        None,
    ),
    "negative offset": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, b"", None),
    "offsets reversed": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, b"1", None),
    "offsets beyond the end": (
        {"a": {"dtype": "U8", "shape": [40], "data_offsets": [0, 40]}},
        b"1234",
        None,
    ),
    "trailing bytes": ({"a": U8}, b"12345678", None),
    "truncated data": ({"a": U8}, b"12", None),
    "overlap": (
        {"a": U8, "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}},
        b"123456",
        None,
    ),
    "hole": (
        {"a": U8, "b": {"dtype": "U8", "shape": [2], "data_offsets": [6, 8]}},
        b"12345678",
        None,
    ),
    "the same bytes twice": ({"a": U8, "b": U8}, b"1234", None),
    "size is not the shape's": (
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}},
        b"1234",
        None,
    ),
    "unknown number format": (
        {"a": {"dtype": "F12", "shape": [4], "data_offsets": [0, 4]}},
        b"1234",
        None,
    ),
    "dtype is a number": ({"a": {"dtype": 3, "shape": [4], "data_offsets": [0, 4]}}, b"1234", None),
    "negative shape": (
        {"a": {"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]}},
        b"1234",
        None,
    ),
    "shape that overflows": (
        {"a": {"dtype": "U8", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
        b"1234",
        None,
    ),
    "shape beyond 64 bits": (
        {"a": {"dtype": "U8", "shape": [2**70], "data_offsets": [0, 4]}},
        b"1234",
        None,
    ),
    "shape is no list": ({"a": {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}}, b"1234", None),
    "tensor is no table": ({"a": 7}, b"", None),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": U8}, b"1234", None),
    "the same key twice": (
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"12",
        None,
    ),
    "no tensor at all": ({}, b"", None),
}


@pytest.mark.parametrize("case", CORPUS)
def test_damaged_header(case: str, single: Path, raw_file: Callable[..., bytes]) -> None:
    (single / "model.safetensors").write_bytes(raw_file(*CORPUS[case]))
    refusal(single)


@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 7, b"\0" * 8, b"\xff" * 64])
def test_hardly_a_file(data: bytes, single: Path) -> None:
    (single / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refusal(single).what


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "C:\\x.safetensors",
        "c:x.safetensors",
        "..\\x.safetensors",
        "sub/x.safetensors",
        "x\0.safetensors",
        "..",
        ".",
        "",
        "config.json",
        "x" * 300 + ".safetensors",
        "\u202ex.safetensors",
    ],
)
def test_shard_names_that_could_leave_the_folder(shard: str, sharded: Path) -> None:
    # The file that "../" leads to exists and is sound, so that only the name can be the reason.
    (sharded.parent / "outside.safetensors").write_bytes((sharded / FIRST).read_bytes())
    edit_index(sharded, **{"layers.0.bias": shard})
    assert "layers.0.bias" in refusal(sharded).what


@pytest.mark.parametrize("value", [None, 7, ["a"], {"a": 1}])
def test_shard_names_of_another_type(value: object, sharded: Path) -> None:
    edit_index(sharded, **{"layers.0.bias": value})  # type: ignore[arg-type]
    refusal(sharded)


def test_missing_shard(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    error = refusal(sharded)
    assert FIRST in error.what and "missing" in error.what


def test_truncated_shard(sharded: Path) -> None:
    with (sharded / FIRST).open("r+b") as file:
        file.truncate((sharded / FIRST).stat().st_size - 1)
    assert FIRST in refusal(sharded).what


def test_key_that_its_shard_does_not_have(sharded: Path) -> None:
    edit_index(sharded, ghost=FIRST)
    error = refusal(sharded)
    assert "'ghost'" in error.what and FIRST in error.what


def test_key_that_lies_in_another_shard(sharded: Path) -> None:
    edit_index(sharded, **{"layers.1.bias": FIRST})
    assert "layers.1.bias" in refusal(sharded).what


def test_tensor_that_the_index_does_not_know(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"]["layers.0.bias"]
    (sharded / INDEX).write_text(json.dumps(index))
    assert "layers.0.bias" in refusal(sharded).what


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_damaged_index(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    assert INDEX in refusal(sharded).what


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff\xfe"])
def test_damaged_config(text: str, single: Path) -> None:
    (single / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(single).what


def test_missing_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert "config.json" in refusal(single).what


def test_missing_folder(tmp_path: Path) -> None:
    assert "not a folder" in refusal(tmp_path / "nowhere").what


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_and_never_opened(name: str, single: Path) -> None:
    (single / "model.safetensors").unlink()
    trap = single / name
    trap.touch()
    trap.chmod(0)
    os.utime(trap, (1, 1))
    error = refusal(single)
    assert "pickle" in error.what and name in error.what
    assert "save_pretrained" in error.fix
    assert trap.stat().st_atime == 1


def test_no_weights_at_all(single: Path) -> None:
    (single / "model.safetensors").unlink()
    assert "no weights" in refusal(single).what


def test_link_that_leaves_the_folder(single: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.safetensors"
    (single / "model.safetensors").rename(outside)
    (single / "model.safetensors").symlink_to(outside)
    error = refusal(single)
    assert "link" in error.what and str(outside) in error.why


def test_link_to_nothing(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").symlink_to("gone.safetensors")
    refusal(single)


def test_links_of_the_hub_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    blobs = repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    assert len(CheckpointIndex.open(snapshot).tensors) == 6
    # Out of blobs, but still below the cache: not where the hub puts anything.
    stray = repository / "stray.safetensors"
    (snapshot / FIRST).resolve().rename(stray)
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(stray)
    assert "link" in refusal(snapshot).what


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_a_pipe_does_not_hang(name: str, single: Path) -> None:
    (single / name).unlink(missing_ok=True)
    os.mkfifo(single / name)
    if name == INDEX:
        # A pipe is no index file, and there is a sound single file beside it.
        assert CheckpointIndex.open(single).tensors
    else:
        refusal(single)


def test_a_folder_in_place_of_a_file(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").mkdir()
    refusal(single)


def test_plain_names() -> None:
    assert is_plain_name("model-00001-of-00002.safetensors")
    assert is_plain_name("gewichte-ä.safetensors")
    assert not is_plain_name("a/b")
    assert not is_plain_name("a\nb")


def test_errors_leave_with_status_one(single: Path) -> None:
    (single / "config.json").unlink()
    error = refusal(single)
    assert isinstance(error, ConmoeError) and error.exit_code == 1
