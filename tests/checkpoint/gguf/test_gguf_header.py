"""The header of a GGUF file: as the library's own reader has it, and one clear error for each way of being damaged."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from conmoe_edge.checkpoint.gguf.files import names_gguf, open_files
from conmoe_edge.checkpoint.gguf.header import read_header
from conmoe_edge.checkpoint.gguf.types import can_expand
from conmoe_edge.errors import CheckpointError, UnsupportedModel, UsageError


def written(path: Path, *, split: tuple[int, int, int] | None = None, first: int = 0) -> Path:
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_uint32("olmoe.block_count", 3)
    writer.add_float32("olmoe.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_int64("olmoe.long", -5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "Ġb"])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3])
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[2])
    values = np.arange(256, dtype=np.float32).reshape(2, 4, 32)
    for number, kind in enumerate(("F32", "F16", "BF16", "Q8_0", "Q4_0", "MXFP4"), first):
        found = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"t{number}", gguf.quantize(values, found), raw_dtype=found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_says_what_the_library_says(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf")
    reader, header = gguf.GGUFReader(path), read_header(tmp_path, "a.gguf")
    theirs = {
        name: one.contents() for name, one in reader.fields.items() if not name.startswith("GGUF.")
    }
    ours = {
        name: one.tolist() if isinstance(one, np.ndarray) else one
        for name, one in header.metadata.items()
    }
    assert ours == theirs
    assert header.shard.data_start == reader.data_offset
    wanted = [
        (one.name, one.tensor_type.name, tuple(one.shape[::-1]), one.data_offset, one.n_bytes)
        for one in reader.tensors
    ]
    assert wanted == [(e.name, e.dtype, e.shape, e.offset, e.nbytes) for e in header.tensors]


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _file(keys: list[bytes], tensors: list[bytes], counts: tuple[int, int] | None = None) -> bytes:
    number, fields = counts or (len(tensors), len(keys))
    head = struct.pack("<4sIQQ", b"GGUF", 3, number, fields) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32) + bytes(256)


def _key(name: str, kind: int, data: bytes) -> bytes:
    return _string(name) + struct.pack("<I", kind) + data


def _tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _string(name) + sizes + struct.pack("<IQ", kind, offset)


HUGE = (1 << 64) - 1
ARCH = _key("general.architecture", 8, _string("olmoe"))
DAMAGED = {
    "empty": b"",
    "another kind of file": b"PK\x03\x04" + bytes(100),
    "many tensors": _file([ARCH], [], (HUGE, 1)),
    "many fields": _file([ARCH], [], (0, HUGE)),
    "more tensors than there are": _file([ARCH], [_tensor("a", (8,))], (1000, 1)),
    "a long name": _file([struct.pack("<Q", HUGE) + b"abc"], []),
    "a long text": _file([_string("a") + struct.pack("<IQ", 8, 1 << 40)], []),
    "a long list": _file([_key("a", 9, struct.pack("<IQ", 4, HUGE))], []),
    "a long list of texts": _file([_key("a", 9, struct.pack("<IQ", 8, 1 << 50))], []),
    "a list of lists": _file([_key("a", 9, struct.pack("<IQIQ", 9, 1, 4, 1))], []),
    "a type of field": _file([_key("a", 99, b"1234")], []),
    "the same field": _file([ARCH, ARCH], [_tensor("a", (8,))]),
    "no UTF-8": _file([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)], []),
    "an alignment of 0": _file(
        [ARCH, _key("general.alignment", 4, struct.pack("<I", 0))], [_tensor("a", (8,))]
    ),
    "no axes": _file([ARCH], [_tensor("a", ())]),
    "many axes": _file([ARCH], [_string("a") + struct.pack("<I", 1 << 31) + bytes(64)]),
    "an empty axis": _file([ARCH], [_tensor("a", (8, 0))]),
    "huge axes": _file([ARCH], [_tensor("a", (1 << 40, 1 << 40))]),
    "half a block": _file([ARCH], [_tensor("a", (24,), 8)]),
    "behind the end": _file([ARCH], [_tensor("a", (8,), 0, 1 << 20)]),
    "far behind the end": _file([ARCH], [_tensor("a", (8,), 0, HUGE - 31)]),
    "not aligned": _file([ARCH], [_tensor("a", (8,), 0, 4)]),
    "the same tensor": _file([ARCH], [_tensor("a", (8,)), _tensor("a", (8,), 0, 32)]),
    "one in another": _file([ARCH], [_tensor("a", (32,)), _tensor("b", (32,), 0, 32)]),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_what_cannot_be_is_one_clear_error(how: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(DAMAGED[how])
    with pytest.raises(CheckpointError, match=r"a\.gguf is damaged") as caught:
        read_header(tmp_path, "a.gguf")
    assert caught.value.why and caught.value.fix


def test_a_file_that_is_cut_anywhere_in_its_header_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path / "whole.gguf").read_bytes()
    header = read_header(tmp_path, "whole.gguf")
    end = max(one.offset + one.nbytes for one in header.tensors)
    for length in (*range(0, header.shard.data_start, 31), end - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is damaged"):
            read_header(tmp_path, "cut.gguf")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "byte order"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1"),
        (struct.pack("<4sIQQ", b"GGUF", 9, 0, 0), "version 9"),
        (_file([ARCH], [_tensor("a", (32,), 200)]), "type number 200"),
        (_file([_key("general.architecture", 8, _string("clip"))], [_tensor("a", (8,))]), "no language model"),
        (
            _file([ARCH, _key("general.type", 8, _string("adapter"))], [_tensor("a", (8,))]),
            "no language model",
        ),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_named(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(UnsupportedModel, match=says):
        open_files(tmp_path / "a.gguf")


def test_links_out_of_the_folder_and_pipes_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "real.gguf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.gguf").symlink_to(tmp_path / "real.gguf")
    with pytest.raises(CheckpointError, match="link that leaves"):
        open_files(tmp_path / "folder" / "a.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match="not a plain file"):
        open_files(tmp_path / "pipe.gguf")


def test_a_model_in_parts_is_one_model(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    written(parts[0], split=(0, 2, 12))
    written(parts[1], split=(1, 2, 12), first=6)
    for asked in (*parts, tmp_path):
        assert names_gguf(asked)
        files = open_files(asked)
        assert files.path == parts[0]
        assert list(files.index.files) == [one.name for one in parts]
        assert len(files.index.tensors) == 12
    parts[1].rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf is missing"):
        open_files(parts[0])
    written(parts[1], split=(0, 2, 12), first=6)
    with pytest.raises(CheckpointError, match="not part 2 of 2"):
        open_files(parts[0])
    written(parts[1], split=(1, 2, 12))
    with pytest.raises(CheckpointError, match="The tensor 't0' is in"):
        open_files(parts[0])
    written(parts[1], split=(1, 2, 12), first=6)
    written(parts[0], split=(0, 2, 13))
    with pytest.raises(CheckpointError, match="promises 13"):
        open_files(parts[0])


def test_a_folder_with_two_models_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        written(tmp_path / name)
    with pytest.raises(UsageError, match="2 GGUF models") as caught:
        open_files(tmp_path)
    assert str(tmp_path / "a.gguf") in caught.value.fix
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not names_gguf(tmp_path)


def test_every_block_format_of_the_library_can_be_expanded() -> None:
    """All types that models come in, but those that the library itself has no expansion for."""
    cannot = {one.name for one in gguf.GGMLQuantizationType if not can_expand(one.name)}
    assert cannot <= {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "NVFP4", "Q1_0"}
    assert {"Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ1_M", "IQ4_XS", "MXFP4", "BF16"}.isdisjoint(
        cannot
    )
