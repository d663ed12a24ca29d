"""Room for one more token in a cache layer with a sliding window.

transformers' layer keeps the last W - 1 tokens and copies them for each new one. Here they lie in a buffer with room
for ``STEP_TOKENS`` more, and the layer's ``keys`` and ``values`` are views that move along it: they are copied once in
so many tokens. The layer stays transformers' own: whatever else replaces its views is copied into the buffer when the
next token comes.

Memory: the window and ``STEP_TOKENS`` tokens, before it is full no more than a layer without a window takes
(``kv_cache.py``); the plan counts W + ``WINDOW_AHEAD`` (``model/anatomy.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from conmoe_edge.offload.fastpath.kv_cache import LIMIT, STEP_TOKENS, takes_one_more, widths_of
from conmoe_edge.offload.kernels.cpu.bindings import Cached

_BUFFERS = "_conmoe_buffers"
"""The attribute of a cache layer that holds its two buffers."""


def room_in_window(
    layer: DynamicSlidingWindowLayer, heads: int, width: int, value_width: int
) -> Cached | None:
    """Where another token can be written behind what is held, [1, heads, tokens, width] in bf16 or in rows of bytes;
    ``None`` where it cannot. What is held moves where there is no room behind it.
    """
    if layer.record_past or not takes_one_more(layer, heads, width, value_width):
        return None
    keys: Any = layer.keys
    values: Any = layer.values
    held = keys.shape[-2]
    if held >= layer.sliding_window:
        return None
    places = []
    for name, one, old in zip(("keys", "values"), (keys, values), _buffers(layer), strict=True):
        buffer = old if old is not None and _room_behind(one, old) else _filled(one, layer)
        start = _start(one, buffer) if buffer is old else 0
        setattr(layer, name, buffer.narrow(-2, start, held))
        places.append((buffer, start))
    setattr(layer, _BUFFERS, (places[0][0], places[1][0]))
    first, second = [buffer.narrow(-2, start, buffer.shape[-2] - start) for buffer, start in places]
    return Cached.of(first, second, held, widths_of(layer))


def has_one_more(layer: DynamicSlidingWindowLayer) -> None:
    """What ``room_in_window`` gave has been written to."""
    layer.cumulative_length += 1
    for name, buffer in zip(("keys", "values"), getattr(layer, _BUFFERS), strict=True):
        start, held = _start(getattr(layer, name), buffer), getattr(layer, name).shape[-2] + 1
        over = max(0, held - (layer.sliding_window - 1))
        setattr(layer, name, buffer.narrow(-2, start + over, held - over))


def _buffers(layer: DynamicSlidingWindowLayer) -> tuple[Tensor | None, Tensor | None]:
    return getattr(layer, _BUFFERS, (None, None))


def _room_behind(view: Tensor, buffer: Tensor) -> bool:
    """Whether ``view`` lies in ``buffer``, with room for a token behind it."""
    if view.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
        return False
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False  # such tensors are read-only outside of inference mode
    inside = view.stride() == buffer.stride() and view.shape[1] == buffer.shape[1]
    return inside and _start(view, buffer) + view.shape[-2] < buffer.shape[-2]


def _filled(view: Tensor, layer: DynamicSlidingWindowLayer) -> Tensor:
    """A new buffer that begins with ``view``."""
    held, most = view.shape[-2], layer.sliding_window + STEP_TOKENS
    # No more than the plan counts for a conversation of this length, also where the window is full already.
    room = -(-(layer.cumulative_length + 1) // STEP_TOKENS) * STEP_TOKENS
    tokens = max(held + 1, min(room, most, getattr(layer, LIMIT, most)))
    buffer = view.new_empty((*view.shape[:-2], tokens, view.shape[-1]))
    buffer.narrow(-2, 0, held).copy_(view)
    return buffer


def _start(view: Tensor, buffer: Tensor) -> int:
    """Where ``view`` begins in ``buffer``, in tokens."""
    return (view.storage_offset() - buffer.storage_offset()) // view.shape[-1]
