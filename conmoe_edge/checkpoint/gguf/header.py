"""The header of a GGUF file: metadata and where each tensor lies. No weight is read.

The library's own reader (``gguf.GGUFReader``) believes the counts and lengths of a file and maps it by a path of its
own. So the header is read here, with limits, from a file that ``contained.py`` opened; what the numbers of types mean
is the library's. ``tests/checkpoint/gguf`` compares with the library's reader.

Source: the GGUF specification in ggml (docs/gguf.md), versions 2 and 3, little endian.

Peak memory: the header as Python objects, 128 MiB of the file at the most. Raises ``CheckpointError`` and
``UnsupportedModel``.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from conmoe_edge.checkpoint.fs.contained import open_inside
from conmoe_edge.checkpoint.gguf.types import GgmlType, type_numbered
from conmoe_edge.checkpoint.tensors.tensor_index import ShardFile, TensorEntry, damaged_header
from conmoe_edge.errors import CheckpointError, UnsupportedModel

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_BYTES = 128 << 20
"""Of a header; those with the largest vocabularies have some 20 MB."""
_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 18
_MOST_NAME = 1 << 10
_MOST_ALIGNMENT = 1 << 20
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Number of a metadata type -> its code in ``struct``, and in numpy."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """One file. ``tensors`` in the order of the file, shapes as numpy has them (GGUF names the fastest axis first);
    ``dtype`` of an entry is the name of its GGML type. Numbers of metadata are Python's, arrays of numbers numpy's.
    """

    shard: ShardFile
    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]


def read_header(folder: Path, name: str) -> GgufHeader:
    """Read and check the header of the file ``name`` of ``folder``.

    Raises:
        CheckpointError: missing, outside the folder, no plain file, truncated, damaged.
        UnsupportedModel: of a version, byte order or number format that is not read.
    """
    path = folder / name
    try:
        with os.fdopen(open_inside(folder, name), "rb", buffering=1 << 18) as file:
            return _Header(path, file, os.fstat(file.fileno()).st_size).read()
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}.", error.strerror or "", "Check the disk, and copy the file again."
        ) from error


class _Header:
    """The bytes of one header, taken from front to back."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self._file = file
        self._at = 0
        self._most = min(size, _MOST_BYTES)

    def read(self) -> GgufHeader:
        if self.size < 24 or self._take(4, "its mark") != MAGIC:
            raise damaged_header(self.path, "it does not begin as a GGUF file does")
        self._check_version(self._number("I"))
        tensors, keys = self._number("Q"), self._number("Q")
        if keys > _MOST_KEYS or tensors > _MOST_TENSORS:
            self._refuse(f"it says that it has {keys} fields and {tensors} tensors")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text("the name of a field", _MOST_NAME)
            if key in metadata:
                self._refuse(f"it has the field {key!r} twice")
            metadata[key] = self._value(self._number("I"), key)
        described = [self._described() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT:
            self._refuse(f"general.alignment = {str(alignment)[:40]}")
        start = -(-self._at // alignment) * alignment
        shard = ShardFile(self.path.name, self.path, self.size, start)
        return GgufHeader(shard, metadata, self._placed(described, start, alignment))

    def _check_version(self, version: int) -> None:
        if version & 0xFFFF == 0:
            raise UnsupportedModel(
                f"{self.path} is written for processors of the other byte order.",
                "big-endian GGUF files are not read here",
                "download the usual little-endian file of the model",
            )
        if version not in _VERSIONS:
            raise UnsupportedModel(
                f"{self.path} is GGUF of version {version}.",
                "versions 2 and 3 are read",
                "download a newer file of the model, or convert it again with llama.cpp",
            )

    def _described(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        name = self._text("the name of a tensor", _MOST_NAME)
        axes = self._number("I")
        if not 1 <= axes <= 4:
            self._refuse(f"the tensor {name!r} has {axes} axes")
        shape = struct.unpack(f"<{axes}Q", self._take(8 * axes, name))[::-1]
        kind, offset = self._number("I"), self._number("Q")
        if not all(shape) or math.prod(shape) >= 1 << 62:
            self._refuse(f"the tensor {name!r} has the shape {list(shape)}")
        found = type_numbered(kind)
        if found is None:
            raise UnsupportedModel(
                f"The tensor {name} of {self.path} is of GGML's type number {kind}.",
                "the installed gguf library does not know this type",
                "pip install --upgrade gguf, or take a file in another quantisation (Q4_K_M, Q8_0, BF16)",
            )
        return name, found, shape, offset

    def _placed(
        self,
        described: list[tuple[str, GgmlType, tuple[int, ...], int]],
        start: int,
        alignment: int,
    ) -> tuple[TensorEntry, ...]:
        entries = []
        names: set[str] = set()
        for name, kind, shape, offset in described:
            if name in names:
                self._refuse(f"it has the tensor {name!r} twice")
            names.add(name)
            if shape[-1] % kind.block:
                self._refuse(
                    f"rows of {name!r} have {shape[-1]} numbers, which are no whole blocks"
                )
            nbytes = math.prod(shape) // kind.block * kind.block_bytes
            if offset % alignment or start + offset + nbytes > self.size:
                self._refuse(
                    f"the tensor {name!r} would end at byte {start + offset + nbytes} of {self.size}"
                )
            entries.append(
                TensorEntry(name, self.path.name, kind.name, shape, start + offset, nbytes)
            )
        end = start
        for entry in sorted(entries, key=lambda one: one.offset):
            if entry.offset < end:
                self._refuse(f"the tensor {entry.name!r} lies in the bytes of another one")
            end = entry.offset + entry.nbytes
        return tuple(entries)

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text(key)
        if kind != _ARRAY:
            self._refuse(f"the field {key!r} is of an unknown type ({kind})")
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            if count > self._left // 8:
                self._refuse(f"the field {key!r} would have {count} texts")
            return [self._text(key) for _ in range(count)]
        if inner not in _SCALARS:
            self._refuse(f"the field {key!r} is a list of an unknown type ({inner})")
        numbers = np.dtype(_SCALARS[inner]).newbyteorder("<")
        return np.frombuffer(self._take(count * numbers.itemsize, key), numbers)

    @property
    def _left(self) -> int:
        return self._most - self._at

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}"), "a number"))[0]

    def _text(self, what: str, most: int = _MOST_BYTES) -> str:
        length = self._number("Q")
        if length > most:
            self._refuse(f"{what} would have {length} bytes")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            self._refuse(f"{what} is no UTF-8")

    def _take(self, count: int, what: str) -> bytes:
        if count > self._left:
            where = "the file" if self._most == self.size else "the largest header that is read"
            self._refuse(f"{where} ends at byte {self._most}, within {what}")
        data = self._file.read(count)
        if len(data) != count:
            self._refuse(f"the file ends within {what}")
        self._at += count
        return data

    def _refuse(self, why: str) -> NoReturn:
        raise damaged_header(self.path, why)
