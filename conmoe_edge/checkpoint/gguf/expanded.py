"""The tensors of GGUF files as a plain checkpoint would have them, read and expanded when they are asked for.

The ``gguf`` library expands the blocks. Peak memory: the part that was asked for as stored and expanded, and a piece
of it of 16 MiB in fp32. Nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.gguf.logical import GgufLogical
from conmoe_edge.checkpoint.gguf.types import expand_blocks
from conmoe_edge.checkpoint.tensors.described import Described
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy, ShardReader
from conmoe_edge.errors import CheckpointError

_PIECE = 16 << 20


class GgufTensors(Mapping[str, Lazy]):
    """A view on ``reader``, which has the tensors of the files, by the names of a plain checkpoint."""

    def __init__(self, reader: ShardReader, tensors: Mapping[str, GgufLogical]) -> None:
        self._reader = reader
        self._tensors = tensors

    def __getitem__(self, name: str) -> Lazy:
        return GgufTensor(self._tensors[name], self._reader)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class GgufTensor(Described):
    """One tensor; ``tensor[...]`` reads and expands it. A run of its first axis reads only that run, unless its rows
    are put in another order.

    Raises:
        CheckpointError: on reading, where a number is none or infinite; as ``ShardReader.read``.
    """

    __slots__ = ("_logical", "_reader")

    def __init__(self, logical: GgufLogical, reader: ShardReader) -> None:
        super().__init__(logical.name, logical.shape, logical.dtype)
        self._logical = logical
        self._reader = reader

    def __getitem__(self, key: Any) -> Tensor:
        shape = self._logical.shape
        if isinstance(key, EllipsisType):
            return self._run(0, shape[0])
        if not isinstance(key, bool) and self._logical.how not in ("turned", "joined"):
            if isinstance(key, int) and -shape[0] <= key < shape[0]:
                return self._run(key % shape[0], 1)[0]
            if isinstance(key, slice) and key.step in (None, 1):
                first, last, _ = key.indices(shape[0])
                return self._run(first, max(0, last - first))
        return self._run(0, shape[0])[key]

    def _run(self, first: int, count: int) -> Tensor:
        """``count`` entries of the first axis from ``first`` on."""
        one = self._logical
        if one.how == "turned":
            return self._turned(self._rows(one.stored[0], 0, one.shape[0]))
        if one.how == "joined":
            return self._joined()
        if one.how == "rows":
            return self._rows(one.stored[0], one.first + first, count, one.shape[1:])
        out = torch.empty(count, *one.shape[1:], dtype=self.dtype)
        for number in range(count):
            out[number] = self._expert(first + number)
        return out

    def _expert(self, number: int) -> Tensor:
        """One entry of a stack whose matrices are [in, out]."""
        one = self._logical
        if len(one.shape) == 2:  # biases, interleaved
            parts = [self._rows(name, number, 1)[0] for name in one.stored]
            return torch.stack(parts, -1).flatten()
        high = one.shape[2] // len(one.stored)
        parts = [self._rows(name, number * high, high) for name in one.stored]
        if one.how == "flipped":
            return parts[0].T
        return torch.stack(parts, 1).flatten(0, 1).T

    def _joined(self) -> Tensor:
        """The keys of a head are [rank, keys] in the file, its values [values, rank]."""
        one = self._logical
        shapes = [self._reader.index.tensors[name].shape for name in one.stored]
        keys, values = (
            self._rows(name, 0, shape[0] * shape[1]).view(shape)
            for name, shape in zip(one.stored, shapes, strict=True)
        )
        return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1).contiguous()

    def _turned(self, rows: Tensor) -> Tensor:
        """llama.cpp turns neighbouring rows, transformers those that are half a head apart."""
        heads = self._logical.heads
        halves = rows.view(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
        return halves.transpose(1, 2).reshape(rows.shape).contiguous()

    def _rows(
        self, stored: str, first: int, count: int, inner: tuple[int, ...] | None = None
    ) -> Tensor:
        """Rows of a tensor of the file, seen as [rows, columns]; with ``inner`` each entry has that shape."""
        entry = self._reader.index.tensors[stored]
        columns = entry.shape[-1]
        if inner == ():  # entries are single numbers
            whole = self._expanded(stored, 0, 1)[0]
            return whole[first : first + count].clone()
        if inner is not None:
            per = math.prod(inner) // columns
            return self._expanded(stored, first * per, count * per).view(count, *inner)
        return self._expanded(stored, first, count)

    def _expanded(self, stored: str, first: int, count: int) -> Tensor:
        entry = self._reader.index.tensors[stored]
        columns = entry.shape[-1]
        row_bytes = entry.nbytes // (math.prod(entry.shape) // columns)
        out = torch.empty(count, columns, dtype=self.dtype)
        step = max(1, _PIECE // (4 * columns))
        for start in range(0, count, step):
            rows = min(step, count - start)
            data = self._reader.read(entry, (first + start) * row_bytes, rows * row_bytes)
            floats = expand_blocks(data.numpy().reshape(rows, row_bytes), entry.dtype)
            out[start : start + rows] = torch.from_numpy(floats)
        if not bool(out.isfinite().all()):
            raise CheckpointError(
                f"The tensor {stored} of {entry.file} holds numbers that are none, or too large.",
                f"the weights of {self.name} cannot be right",
                "Download the file again; if it is the same afterwards, the file itself is broken.",
            )
        return out
