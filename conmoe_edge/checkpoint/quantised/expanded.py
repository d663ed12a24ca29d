"""The tensors of a quantised checkpoint as a plain one would have them, expanded when they are read.

Peak memory: the part that was asked for as stored and expanded, and one expert of it in fp32. Nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.dtypes import CODES
from conmoe_edge.checkpoint.quantised import fp8, mxfp4
from conmoe_edge.checkpoint.quantised.scheme import Logical, Scheme
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy
from conmoe_edge.errors import CheckpointError


class ExpandedTensors(Mapping[str, Lazy]):
    """A view on ``reader``, which has the tensors of the file, by the names of a plain checkpoint."""

    def __init__(self, reader: Mapping[str, Lazy], scheme: Scheme) -> None:
        self._reader = reader
        self._scheme = scheme

    def __getitem__(self, name: str) -> Lazy:
        logical = self._scheme.tensors[name]
        if logical.form == "plain":
            return self._reader[logical.values]
        return ExpandedTensor(logical, self._reader)

    def __iter__(self) -> Iterator[str]:
        return iter(self._scheme.tensors)

    def __len__(self) -> int:
        return len(self._scheme.tensors)


class ExpandedTensor:
    """One quantised tensor; ``tensor[...]`` reads and expands it. A run of experts of a stack reads only those.

    Raises:
        CheckpointError: on reading, where a scale is no number, infinite or zero below weights that are not.
    """

    __slots__ = ("_logical", "_reader")

    def __init__(self, logical: Logical, reader: Mapping[str, Lazy]) -> None:
        self._logical = logical
        self._reader = reader

    @property
    def name(self) -> str:
        """As a plain checkpoint has it."""
        return self._logical.name

    @property
    def shape(self) -> torch.Size:
        """Of the whole, expanded."""
        return torch.Size(self._logical.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type that a read gives."""
        return getattr(torch, self._logical.dtype)

    def get_shape(self) -> list[int]:
        """As the slice object of safetensors has it."""
        return list(self._logical.shape)

    def get_dtype(self) -> str:
        """The header's code of ``dtype``."""
        return CODES[self._logical.dtype]

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
        values, scales = self._reader[one.values], self._reader[one.scales]
        if len(one.shape) == 2:
            return self._piece(values[...], scales[...])
        first, last, _ = run.indices(one.shape[0])
        out = torch.empty(max(0, last - first), *one.shape[1:], dtype=self.dtype)
        for number in range(first, last):
            # One scale for a stack of a single expert may have no axis for it.
            alone = scales.shape.numel() == 1
            out[number - first] = self._piece(
                values[number], scales[...] if alone else scales[number]
            )
        return out

    def _piece(self, values: Tensor, scales: Tensor) -> Tensor:
        one = self._logical
        if one.form == "mxfp4":
            if bool((scales == mxfp4.NO_NUMBER).any()):
                raise self._broken("holds NaN")
            return mxfp4.expand(values, scales, self.dtype)
        factors = scales.float()
        if not bool(factors.isfinite().all()):
            raise self._broken("holds NaN or infinity")
        if bool((factors <= 0).any()):
            raise self._broken("holds a scale that is not above 0")
        return fp8.expand(values, factors, one.block, self.dtype)

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._logical.scales} {what}.",
            f"the weights of {self._logical.name} cannot be right",
            "Download the model again; if it is the same afterwards, the model itself is broken.",
        )
