"""Write safetensors files as a stream: one tensor in memory at a time, hashed on the way, never
read back.

``write_records`` makes a prototypes file whose data section and every large record lie on multiples of
4096, small records on such of 64; ``write_dense`` makes the shards of everything else and their index;
``write_tensors`` is what both stand on. A file has its name only when it is whole and on the disk: it
grows as ``<name>.tmp`` and is renamed at the end.

The header is written first, since names and sizes are known before the bytes are. The format's own
library reads each file's header back before the file gets its name. Peak memory: the largest
tensor. Raises ``NoSpace`` when the disk is full, ``ConmoeError`` when it cannot be written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open

from conmoe_edge.checkpoint.format.dtypes import CODES, itemsize, nbytes_of
from conmoe_edge.checkpoint.format.layout import PAGE, record_alignment
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, finish, temporary_name, write_json
from conmoe_edge.checkpoint.fs.disk import disk_errors
from conmoe_edge.checkpoint.tensors.tensor_index import INDEX_FILE, index_files
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy
from conmoe_edge.units import GIB, round_up

_CHUNK = 16 << 20


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor that is going to be written: its name, torch dtype name, shape, and how to get it
    when its turn comes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return nbytes_of(self.dtype, self.shape)

    @classmethod
    def of(cls, lazy: Lazy, name: str | None = None) -> TensorSource:
        """A tensor of the source checkpoint as it is, under its own name or another.

        Raises ``CheckpointError`` for a number format that torch does not have.
        """
        dtype = str(lazy.dtype).removeprefix("torch.")
        return cls(name or lazy.name, dtype, tuple(lazy.shape), lambda: lazy[...])


def write_records(
    path: Path, nbytes: Mapping[str, int], records: Iterable[tuple[str, torch.Tensor]]
) -> WrittenFile:
    """A prototypes file of uint8 records, each on a multiple of what ``record_alignment`` says.

    Args:
        path: the file; an older one is replaced.
        nbytes: name -> size of every record, in file order: whole pages before others, where there are large ones.
        records: ``(name, uint8 [nbytes])`` in the same order. A record is written before the next
            is asked for, so one buffer may be filled again and again.
    """
    place = 0
    for name, size in nbytes.items():
        step = record_alignment(size)
        if size <= 0 or size % step or place % step:
            raise ValueError(f"size or place of the record {name!r} is no multiple of {step}")
        place += size
    stream = iter(records)

    def take(name: str) -> torch.Tensor:
        got, record = next(stream, (None, None))
        if got != name or record is None:
            raise ValueError(f"the next record should be {name!r}, got {got!r}")
        return record

    sources = [
        TensorSource(name, "uint8", (size,), lambda name=name: take(name))
        for name, size in nbytes.items()
    ]
    written = write_tensors(path, sources, alignment=PAGE)
    if next(stream, None) is not None:
        raise ValueError("more records than were announced")
    return written


def write_dense(
    folder: Path, sources: Sequence[TensorSource], *, max_shard_bytes: int = GIB
) -> list[WrittenFile]:
    """``dense-*.safetensors`` and their index: the tensors in the order given, a new shard when one
    is full.
    """
    shards: list[list[TensorSource]] = [[]]
    filled = 0
    for source in sources:
        if shards[-1] and filled + source.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += source.nbytes
    written = [
        write_tensors(folder / f"dense-{number:05d}-of-{len(shards):05d}.safetensors", shard)
        for number, shard in enumerate(shards, start=1)
    ]
    total = sum(source.nbytes for source in sources)
    weight_map = {name: file.name for file in written for name in sorted(file.offsets)}
    return [*written, _write_index(folder, total, weight_map)]


def write_dense_index(folder: Path, names: Sequence[str]) -> WrittenFile:
    """The index of weights files that are there already.

    Raises:
        CheckpointError: the header of one is damaged.
    """
    tensors = index_files(folder, names).tensors
    total = sum(entry.nbytes for entry in tensors.values())
    return _write_index(folder, total, {name: tensors[name].file for name in sorted(tensors)})


def _write_index(folder: Path, total: int, weight_map: Mapping[str, str]) -> WrittenFile:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return write_json(folder / INDEX_FILE, index)


def write_tensors(
    path: Path, sources: Sequence[TensorSource], *, alignment: int = 64
) -> WrittenFile:
    """One safetensors file: data section on ``alignment``, tensors back to back in the order given,
    except that wider number formats come first, so that each tensor is aligned to its own.
    """
    sources = sorted(sources, key=lambda source: -itemsize(source.dtype))
    header, offsets = _header(sources, alignment)
    digest = hashlib.sha256()
    with disk_errors(path), temporary_name(path) as temporary:
        with temporary.open("wb") as file:
            _write(file, digest, memoryview(header))
            for source in sources:
                _write(file, digest, _bytes_of(source))
            size = file.tell()
        with safe_open(temporary, framework="np") as handle:
            assert set(handle.keys()) == set(offsets), (
                "the header that was written is not the one that is read"
            )
        finish(temporary, path)
    return WrittenFile(path.name, size, digest.hexdigest(), offsets)


def _header(sources: Sequence[TensorSource], alignment: int) -> tuple[bytes, dict[str, int]]:
    """Length, JSON and padding of the header; where each tensor lies in the file."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in sources:
        if source.name in table:
            raise ValueError(f"two tensors are called {source.name!r}")
        table[source.name] = {
            "dtype": CODES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [end, end + source.nbytes],
        }
        end += source.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # The format allows spaces after the JSON; they count as header, and put the data where it is
    # wanted.
    data_start = round_up(8 + len(text), alignment)
    text = text.ljust(data_start - 8)
    offsets = {
        source.name: data_start + table[source.name]["data_offsets"][0] for source in sources
    }
    return len(text).to_bytes(8, "little") + text, offsets


def _bytes_of(source: TensorSource) -> memoryview:
    """The tensor's bytes on the CPU, checked against what the header says."""
    tensor = source.load().detach()
    name = str(tensor.dtype).removeprefix("torch.")
    if name != source.dtype or tuple(tensor.shape) != source.shape:
        raise ValueError(
            f"{source.name} is {name} {list(tensor.shape)}, not {source.dtype} {list(source.shape)}"
        )
    flat = tensor.to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _write(file: IO[bytes], digest: Any, data: memoryview) -> None:
    for start in range(0, len(data), _CHUNK):
        part = data[start : start + _CHUNK]
        file.write(part)
        digest.update(part)
