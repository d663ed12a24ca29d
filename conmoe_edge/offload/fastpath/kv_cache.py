"""A key-value cache that grows by steps instead of being copied for every token.

transformers' ``DynamicLayer`` concatenates: each token copies all keys and values of its layer.
``GrowingLayer`` keeps them in buffers with room for more and hands out views of the filled part, so
that a buffer is copied once every ``STEP_TOKENS`` tokens. Only the plain full-attention kind is
replaced; sliding windows, linear attention and what a model brings itself stay transformers' own.
Attention sees the same values, so its result is the same to the bit.

``grow_in_steps`` swaps the layers of an ordinary ``DynamicCache`` in place, and tells those with a window how long
their buffers may be (``window_cache.py``). The cache keeps its class, so cropping,
beam search and ``generate`` work as before.

Memory: the buffers, no longer than the planned context; while one layer grows, that layer's old and
new buffers at once (the plan's workspace has that term).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from conmoe_edge.model.kv_rows import row_bytes
from conmoe_edge.model.packed_layers import Packing
from conmoe_edge.offload.kernels.cpu.bindings import Cached

STEP_TOKENS = 256
"""Tokens that the buffers are ahead of the conversation. A longer step copies less often and takes more memory early;
at 256 copying is below a hundredth of what attention reads.
"""

LIMIT = "_conmoe_limit"
"""The attribute of a cache layer with a window that says how many tokens a conversation may have."""


def widths_of(layer: Any) -> tuple[int, int] | None:
    """Numbers of a key and of a value in a layer in 8 bits; ``None`` for one whose rows are numbers."""
    packing: Packing | None = getattr(layer, "packing", None)
    return None if packing is None else packing.widths


class StandsForOthers(DynamicCache):
    """A cache without keys and values: a forward that it comes with calls the model with caches of its own."""


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, tokens, width], each a view of a buffer [B, heads, room, width].

    ``keys`` and ``values`` are the whole state, as in every cache layer. A buffer is used only while the view begins in
    it, so what replaces the views (beam search, a reset) need not know of buffers. What is cropped leaves room that is
    written over.
    """

    def __init__(self, limit: int) -> None:
        """``limit``: tokens, over all sequences of a batch, beyond which no room is kept ahead."""
        super().__init__()
        self.limit = limit
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None
        self._shown: tuple[Any, Any, Cached] | None = None

    @classmethod
    def taking_over(cls, layer: DynamicLayer, limit: int) -> GrowingLayer:
        """The state of ``layer``; it is copied when the next tokens come."""
        own = cls(limit)
        for name, value in vars(layer).items():
            setattr(own, name, value)
        return own

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens [B, heads, n, width]; returns views of all that are held now."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys: Any = self.keys
        values: Any = self.values
        if not (_can_append(keys, key_states) and _can_append(values, value_states)):
            self.forget_buffers()
            return super().update(key_states, value_states, *args, **kwargs)
        held = self.get_seq_length()
        needed = held + key_states.shape[-2]
        self._key_buffer = _roomy(self._key_buffer, keys, key_states, held, needed, self.limit)
        self.keys = _append(self._key_buffer, key_states, held)
        self._value_buffer = _roomy(
            self._value_buffer, values, value_states, held, needed, self.limit
        )
        self.values = _append(self._value_buffer, value_states, held)
        return self.keys, self.values

    def begin_with(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Hold copies of the tokens of all parts [1, heads, n, width], one behind the other; nothing is held yet."""
        self.lazy_initialization(keys[0], values[0])
        held = sum(one.shape[-2] for one in keys)
        self._key_buffer = _filled(keys, held, self.limit)
        self._value_buffer = _filled(values, held, self.limit)
        self._show(held)

    def room_for_one(
        self, groups: int, width: int, value_width: int | None = None
    ) -> Cached | None:
        """Where another token can be written behind what is held, [1, groups, tokens, width] in bf16, values perhaps of
        another width; ``None`` where it cannot. What is held moves where there is no room behind it, as it would in
        ``update``.
        """
        keys: Any = self.keys
        values: Any = self.values
        if self._shown is not None:
            # The views are those that the last token left: all but their length was looked at then.
            shown_keys, shown_values, cached = self._shown
            known = shown_keys is keys and shown_values is values
            if known and cached.sizes == (groups, width, value_width or width):
                return cached
        if not takes_one_more(self, groups, width, value_width or width):
            return None
        held = keys.shape[-2]
        key_buffer = _roomy(self._key_buffer, keys, keys, held, held + 1, self.limit)
        value_buffer = _roomy(self._value_buffer, values, values, held, held + 1, self.limit)
        if key_buffer is not self._key_buffer or value_buffer is not self._value_buffer:
            self._key_buffer, self._value_buffer = key_buffer, value_buffer
            self._show(held)
        return Cached.of(key_buffer, value_buffer, held, widths_of(self))

    def has_one_more(self, cached: Cached) -> None:
        """What ``room_for_one`` gave, ``cached``, has been written to. So the next token's room is known as well, where
        there is some.
        """
        held = self.keys.shape[-2] + 1  # pyright: ignore[reportOptionalMemberAccess]
        self._show(held)
        buffer: Any = self._key_buffer
        if held >= buffer.shape[-2] or buffer.is_inference():
            return
        place = (cached.keys, cached.values, cached.key_step, cached.value_step, held)
        self._shown = self.keys, self.values, Cached(*place, cached.sizes, cached.packed)

    def reset(self) -> None:
        """Drop everything, the buffers too."""
        self.forget_buffers()
        super().reset()

    def forget_buffers(self) -> None:
        """Something else than the buffers' tokens is held from now on."""
        self._key_buffer = self._value_buffer = self._shown = None

    def _show(self, held: int) -> None:
        assert self._key_buffer is not None and self._value_buffer is not None
        self._shown = None
        self.keys = self._key_buffer.narrow(-2, 0, held)
        self.values = self._value_buffer.narrow(-2, 0, held)


def takes_one_more(layer: Any, groups: int, width: int, value_width: int) -> bool:
    """Whether the operator can write behind what a cache layer holds: keys and values [1, groups, tokens, width] of one
    token and more, in bf16 or packed from it, on the CPU, without gradients.
    """
    keys, values = layer.keys, layer.values
    if not layer.is_initialized or keys.requires_grad or values.requires_grad:
        return False
    held, wanted, columns = keys.shape[-2], torch.bfloat16, (width, value_width)
    packing: Packing | None = getattr(layer, "packing", None)
    if packing is not None:
        if packing != Packing(width, value_width, torch.bfloat16):
            return False
        wanted, columns = torch.int8, (row_bytes(width), row_bytes(value_width))
    for one, count in zip((keys, values), columns, strict=True):
        if one.shape != (1, groups, held, count) or not held:
            return False
        if one.dtype != wanted or one.device.type != "cpu":
            return False
    return True


def grow_in_steps(cache: Any, limit: int) -> None:
    """Swap the plain layers of transformers' general cache; any other cache is left alone."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer.taking_over(layer, limit)
        elif type(layer) is DynamicSlidingWindowLayer:
            setattr(layer, LIMIT, limit)


def _can_append(held: Tensor, new: Tensor) -> bool:
    """False where writing in place would not be what concatenation is: a graph that may still need
    the buffer, another dtype, shape or device.
    """
    if torch.is_grad_enabled() and (held.requires_grad or new.requires_grad):
        return False
    if held.dtype != new.dtype or held.device != new.device:
        return False
    return held.numel() == 0 or (
        held.shape[:-2] == new.shape[:-2] and held.shape[-1] == new.shape[-1]
    )


def _roomy(
    buffer: Tensor | None, held: Tensor, like: Tensor, count: int, needed: int, limit: int
) -> Tensor:
    """``buffer`` where it has the ``count`` held tokens and room for ``needed``, else a longer one for tokens ``like``
    those, with a copy of what is held.
    """
    if buffer is not None and _serves(buffer, held, count, needed):
        return buffer
    stepped = -(-needed // STEP_TOKENS) * STEP_TOKENS
    room = max(needed, min(stepped, limit // max(1, like.shape[0])))
    longer = like.new_empty((*like.shape[:-2], room, like.shape[-1]))
    if count:
        longer.narrow(-2, 0, count).copy_(held)
    return longer


def _filled(parts: Sequence[Tensor], held: int, limit: int) -> Tensor:
    """A buffer as of ``_roomy`` that begins with the ``held`` tokens of all parts."""
    buffer = _roomy(None, parts[0], parts[0], 0, held, limit)
    place = 0
    for part in parts:
        buffer.narrow(-2, place, part.shape[-2]).copy_(part)
        place += part.shape[-2]
    return buffer


def _serves(buffer: Tensor, held: Tensor, count: int, needed: int) -> bool:
    if count and (held.data_ptr() != buffer.data_ptr() or held.stride() != buffer.stride()):
        return False
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False  # such tensors are read-only outside of inference mode
    return buffer.shape[-2] >= needed and (count == 0 or held.shape[:-2] == buffer.shape[:-2])


def _append(buffer: Tensor, new: Tensor, held: int) -> Tensor:
    buffer.narrow(-2, held, new.shape[-2]).copy_(new)
    return buffer.narrow(-2, 0, held + new.shape[-2])
