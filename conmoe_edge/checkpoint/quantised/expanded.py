"""The tensors of a quantised checkpoint as a plain one would have them, expanded when they are read.

Peak memory: the part that was asked for as stored and expanded, and one expert of it in fp32. Nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.quantised.forms import FORMS
from conmoe_edge.checkpoint.quantised.scheme import Scheme
from conmoe_edge.checkpoint.quantised.stored import Logical
from conmoe_edge.checkpoint.tensors.described import Described
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy


class ExpandedTensors(Mapping[str, Lazy]):
    """A view on ``reader``, which has the tensors of the file, by the names of a plain checkpoint."""

    def __init__(self, reader: Mapping[str, Lazy], scheme: Scheme) -> None:
        self._reader = reader
        self._scheme = scheme

    def __getitem__(self, name: str) -> Lazy:
        logical = self._scheme.tensors[name]
        if logical.form == "plain":
            return self._reader[logical.parts["values"]]
        return ExpandedTensor(logical, self._reader)

    def __iter__(self) -> Iterator[str]:
        return iter(self._scheme.tensors)

    def __len__(self) -> int:
        return len(self._scheme.tensors)


class ExpandedTensor(Described):
    """One quantised tensor; ``tensor[...]`` reads and expands it. A run of experts of a stack reads only those.

    Raises:
        CheckpointError: on reading, where a part holds what no quantised weight has, such as a scale of NaN.
    """

    __slots__ = ("_logical", "_reader")

    def __init__(self, logical: Logical, reader: Mapping[str, Lazy]) -> None:
        super().__init__(logical.name, logical.shape, logical.dtype)
        self._logical = logical
        self._reader = reader

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, EllipsisType):
            return self._expanded(slice(None))
        if len(self._logical.shape) > 2 and not isinstance(key, bool):
            count = self._logical.shape[0]
            if isinstance(key, int) and -count <= key < count:
                start = key % count
                return self._expanded(slice(start, start + 1))[0]
            if isinstance(key, slice) and key.step in (None, 1):
                return self._expanded(key)
        return self._expanded(slice(None))[key]

    def _expanded(self, run: slice) -> Tensor:
        one = self._logical
        parts = {part: self._reader[name] for part, name in one.parts.items()}
        if len(one.shape) == 2:
            return self._checked({part: lazy[...] for part, lazy in parts.items()})
        first, last, _ = run.indices(one.shape[0])
        out = torch.empty(max(0, last - first), *one.shape[1:], dtype=self.dtype)
        for number in range(first, last):
            own = {part: _of_expert(lazy, number) for part, lazy in parts.items()}
            out[number - first] = self._checked(own)
        return out

    def _checked(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One matrix. FP8 has codes for NaN, and a product may be too large for the format of the model."""
        one = self._logical
        found = FORMS[one.form].expand(one, parts)
        if not bool(found.isfinite().all()):
            raise one.broken("values", "holds numbers that are none, or too large")
        return found


def _of_expert(lazy: Lazy, number: int) -> Tensor:
    """One expert's share of a part of a stack; one scale for a stack of a single expert may have no axis for it."""
    return lazy[...] if lazy.shape.numel() == 1 else lazy[number]
