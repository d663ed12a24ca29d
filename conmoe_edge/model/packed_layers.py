"""Cache layers whose keys and values have 8 bits a number (``kv_rows.py``), of which attention sees nothing else.

``PackedUpdate`` in front of a cache layer's class keeps rows of bytes and hands out numbers; the layers that the
runtime uses are ``offload/fastpath/packed_cache.py``. Where a whole text goes through one layer after another, nothing
has to be kept: a layer of ``rounding_cache`` hands out the numbers that its rows would hold and forgets them.

For inference: no gradient goes through a row. Memory: the rows, and one layer's numbers while they are looked at; of
``rounding_cache`` a second copy of what a layer is given, and one sequence's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from conmoe_edge.errors import UsageError
from conmoe_edge.model.kv_rows import pack_rows, unpack_rows


@dataclass(frozen=True, slots=True)
class Packing:
    """What the rows of a layer stand for: numbers of a key, of a value, the format."""

    key_width: int
    value_width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Packing:
        """For keys and values [..., width].

        Raises:
            UsageError: there are no steps for their format.
        """
        if (
            not keys.is_floating_point()
            or keys.dtype is torch.float64
            or keys.dtype != values.dtype
        ):
            raise UsageError(
                f"Keys in {keys.dtype} and values in {values.dtype} are not kept in 8 bits.",
                "there are steps for bfloat16, float16 and float32",
                "load with kv_precision='source'",
            )
        return cls(keys.shape[-1], values.shape[-1], keys.dtype)

    @property
    def widths(self) -> tuple[int, int]:
        """Of a key and of a value."""
        return self.key_width, self.value_width


class PackedUpdate:
    """In front of a cache layer's class: rows go in, numbers come out."""

    packing: Packing | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens [B, heads, n, width]; all that attention is to see, as numbers of that format."""
        self.packing = packing = Packing.of(key_states, value_states)
        layer: Any = super()
        keys, values = layer.update(pack_rows(key_states), pack_rows(value_states), *args, **kwargs)
        return (
            unpack_rows(keys, packing.key_width, packing.dtype),
            unpack_rows(values, packing.value_width, packing.dtype),
        )


class _Forgetful:
    """In front of a cache layer's class: what comes in goes out as rows would hold it, and is forgotten."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, heads, n, width] as numbers that rows can hold; the layer stays empty."""
        Packing.of(key_states, value_states)
        return _rounded(key_states), _rounded(value_states)


class _Packed(PackedUpdate, DynamicLayer):
    """Keeps every token."""


class _PackedWindow(PackedUpdate, DynamicSlidingWindowLayer):
    """Keeps the last tokens."""


class _Rounding(_Forgetful, DynamicLayer):
    """Of a layer that would keep every token."""


class _RoundingWindow(_Forgetful, DynamicSlidingWindowLayer):
    """Of a layer that would keep the last tokens."""


def rounding_cache(config: PretrainedConfig) -> DynamicCache:
    """A cache that stays empty, for whole texts through one layer after another; any number of batches may share it."""
    return _cache(config, _Rounding, _RoundingWindow)


def packed_cache(config: PretrainedConfig) -> DynamicCache:
    """A cache in rows, for conversations."""
    return _cache(config, _Packed, _PackedWindow)


def _cache(
    config: PretrainedConfig, full: type[DynamicLayer], window: type[DynamicSlidingWindowLayer]
) -> DynamicCache:
    """``plan/kv_precision.py`` has looked whether the model has such a form."""
    cache = DynamicCache(config=config)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer:
            layers[index] = window(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            layers[index] = full()
        else:
            raise ValueError(f"{type(layer).__name__} holds something else than keys and values")
    return cache


def _rounded(numbers: Tensor) -> Tensor:
    out = torch.empty_like(numbers, memory_format=torch.contiguous_format)
    for one, given in zip(out, numbers, strict=True):
        one.copy_(unpack_rows(pack_rows(given), given.shape[-1], given.dtype))
    return out
