"""Tensors that are read when they are asked for: ``reader[name][...]`` gives a fresh CPU tensor.

Positioned reads into the tensor's own memory, not a memory map: page faults are slower, and mapped
pages count as memory of this process. Peak memory: what was asked for, once. A ``LazyTensor`` can
stand wherever transformers' loader expects a slice object of safetensors. Reads from several
threads are safe.

Raises ``CheckpointError`` where a file is shorter than its header promised, changed since the
index was read, or fails.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any, Protocol

import torch

from conmoe_edge.checkpoint.format.torch_dtype import torch_dtype
from conmoe_edge.checkpoint.fs.contained import open_inside
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex, TensorEntry
from conmoe_edge.errors import CheckpointError
from conmoe_edge.system_calls import drop_from_cache, read_at

# Linux returns at most 2 GiB less a page from one call; smaller calls also keep Ctrl-C responsive.
_MOST_PER_CALL = 256 << 20


class Lazy(Protocol):
    """A tensor of a model that is read when it is asked for, wherever and in whatever form it lies.

    ``dtype`` and ``shape`` are of what a read gives; each read gives memory of its own. Like ``LazyTensor`` it can
    stand wherever transformers' loader expects a slice object of safetensors.
    """

    @property
    def name(self) -> str:
        """In the checkpoint, as a plain checkpoint of this model would have it."""
        ...

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type that a read gives."""
        ...

    def get_shape(self) -> list[int]:
        """As the slice object of safetensors has it."""
        ...

    def get_dtype(self) -> str:
        """The header's code of ``dtype``, as the slice object of safetensors has it."""
        ...

    def __getitem__(self, key: Any, /) -> torch.Tensor: ...


class _OpenFile:
    """A descriptor, and a lock for systems that cannot read at a position without moving a shared
    cursor.
    """

    def __init__(self, folder: Path, name: str, drop_cache: bool) -> None:
        self.fd = open_inside(folder, name)
        self.drop_cache = drop_cache
        self.lock = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset`` on; the count is smaller than asked for only at the end of
        the file.
        """
        done = 0
        while done < len(view):
            part = view[done : done + _MOST_PER_CALL]
            # Python itself repeats a call that a signal interrupted; a short count is the only
            # thing left to handle.
            got = read_at(self.fd, part, offset + done, self.lock)
            if got == 0:
                break
            done += got
        if self.drop_cache:
            # The kernel drops whole pages only, so pages that two tensors share stay until the
            # second is read.
            drop_from_cache(self.fd, offset, done)
        return done


class ShardReader(Mapping[str, "LazyTensor"]):
    """The tensors of a checkpoint by name. Holds one descriptor per file that was read from; use it
    in a ``with`` block.

    Args:
        index: the checked checkpoint.
        drop_cache: tell the system not to keep what was read in its page cache, so that a model
            much larger than memory does not push everything else out. Has no effect where the
            system has no such call.
    """

    def __init__(self, index: CheckpointIndex, *, drop_cache: bool = True) -> None:
        self.index = index
        self._drop_cache = drop_cache
        self._files: dict[str, _OpenFile] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __getitem__(self, name: str) -> LazyTensor:
        return LazyTensor(self.index.tensors[name], self)

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.tensors)

    def __len__(self) -> int:
        return len(self.index.tensors)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files. Lazy tensors of this reader cannot be read afterwards."""
        with self._lock:
            self._closed = True
            for file in self._files.values():
                os.close(file.fd)
            self._files.clear()

    def read(self, entry: TensorEntry, start: int, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes of ``entry`` from its byte ``start`` on, as a fresh uint8 tensor
        ``[nbytes]``.
        """
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes:
            file = self._open(entry)
            try:
                got = file.read_into(buffer.numpy().data, entry.offset + start)
            except OSError as error:
                raise _unreadable(entry, error.strerror or "The disk reported an error.") from error
            if got != nbytes:
                raise _unreadable(entry, f"The file ends {nbytes - got} bytes too early.")
        return buffer

    def _open(self, entry: TensorEntry) -> _OpenFile:
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            file = self._files.get(entry.file)
            if file is None:
                shard = self.index.files[entry.file]
                try:
                    file = _OpenFile(self.index.folder, shard.name, self._drop_cache)
                except CheckpointError as error:
                    raise _unreadable(entry, error.why or error.what) from error
                size = os.fstat(file.fd).st_size
                if size != shard.size:
                    os.close(file.fd)
                    raise _unreadable(
                        entry,
                        f"The file had {shard.size} bytes when the run began and now has {size}.",
                    )
                self._files[entry.file] = file
            return file


class LazyTensor:
    """One tensor that is still on disk. ``tensor[...]`` reads it; each read gives memory of its
    own.

    An index or a slice of step 1 on the first axis reads only those rows; any other index reads the
    whole and indexes it.
    """

    __slots__ = ("_reader", "entry")

    def __init__(self, entry: TensorEntry, reader: ShardReader) -> None:
        self.entry = entry
        self._reader = reader

    @property
    def name(self) -> str:
        """In the checkpoint."""
        return self.entry.name

    @property
    def shape(self) -> torch.Size:
        """As ``torch.Tensor.shape``."""
        return torch.Size(self.entry.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type that a read gives."""
        return torch_dtype(self.entry.dtype, self.entry.name)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.entry.nbytes

    def get_shape(self) -> list[int]:
        """As the slice object of safetensors has it."""
        return list(self.entry.shape)

    def get_dtype(self) -> str:
        """The header's code, as the slice object of safetensors has it."""
        return self.entry.dtype

    def __repr__(self) -> str:
        return f"LazyTensor({self.entry.name!r}, {self.entry.dtype}, {list(self.entry.shape)})"

    def __getitem__(self, key: Any) -> torch.Tensor:
        shape = self.entry.shape
        dtype = self.dtype  # before the read, since an unknown format must not cost one
        rows = _rows(key, shape)
        if rows is None:
            whole = self._reader.read(self.entry, 0, self.entry.nbytes).view(dtype).view(shape)
            return whole if isinstance(key, EllipsisType) else whole[key]
        first, count, keep_axis = rows
        row = math.prod(shape[1:]) * dtype.itemsize
        data = self._reader.read(self.entry, first * row, count * row).view(dtype)
        return data.view(count, *shape[1:]) if keep_axis else data.view(shape[1:])


def _rows(key: Any, shape: tuple[int, ...]) -> tuple[int, int, bool] | None:
    """First row, number of rows, whether the axis stays; ``None`` where the key is not a run of
    rows.
    """
    if not shape or isinstance(key, bool):
        return None
    if isinstance(key, int) and -shape[0] <= key < shape[0]:
        return key % shape[0], 1, False
    if isinstance(key, slice) and key.step in (None, 1):
        first, last, _ = key.indices(shape[0])
        return first, max(0, last - first), True
    return None


def _unreadable(entry: TensorEntry, why: str) -> CheckpointError:
    return CheckpointError(
        f"Cannot read the tensor {entry.name!r} from {entry.file}.",
        why,
        "Check the disk, and download or copy the model again.",
    )
