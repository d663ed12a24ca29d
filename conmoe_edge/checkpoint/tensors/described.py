"""What a tensor that is expanded when it is read says of itself: the half of ``Lazy`` that needs no bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from conmoe_edge.checkpoint.format.dtypes import CODES


class Described:
    """``name``, ``shape`` and ``dtype`` (torch's name) are those of the whole, expanded."""

    __slots__ = ("_dtype", "_name", "_shape")

    def __init__(self, name: str, shape: Sequence[int], dtype: str) -> None:
        self._name = name
        self._shape = tuple(shape)
        self._dtype = dtype

    @property
    def name(self) -> str:
        """As a plain checkpoint has it."""
        return self._name

    @property
    def shape(self) -> torch.Size:
        """Of the whole, expanded."""
        return torch.Size(self._shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type that a read gives."""
        return getattr(torch, self._dtype)

    def get_shape(self) -> list[int]:
        """As the slice object of safetensors has it."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The header's code of ``dtype``."""
        return CODES[self._dtype]
