"""What a whole chunk of a prompt leaves in a key-value cache, cut out of one and put into another.

Layers differ in what can be had afterwards:

- one that keeps every token: the chunk's rows, at any time;
- one with a sliding window: the last tokens of the chunk, no more than the window needs, and only until the next tokens
  come;
- one with a state (linear attention, convolutions): that state as it was behind the chunk, only until the next tokens
  come.

So a ``PromptChunk`` has for each layer either rows, or its *end*, which may be missing. A cache that stands at the end
of chunk n is made of the rows of all chunks up to n and the ends that its windows and states need (``standing_at``).
What is put together holds the numbers that the forwards wrote, in buffers of the shape that they would have: what is
computed behind it is the same to the bit.

Served are transformers' general cache and its layers of exactly these kinds, in 8 bits too; anything else has no form
here and is never used again (``form_of`` gives ``None``).

Memory: one layer's keys and values beside what is put in or taken out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from conmoe_edge.model.kv_rows import row_bytes
from conmoe_edge.model.packed_layers import Packing
from conmoe_edge.offload.fastpath.kv_cache import GrowingLayer, grow_in_steps
from conmoe_edge.offload.fastpath.packed_cache import PackedLayer, PackedWindowLayer, pack_in_steps

Tensors = tuple[Tensor, ...]
"""Of one layer: keys and values [1, heads, tokens, width], or states; none for a layer that holds nothing."""


@dataclass(frozen=True, slots=True)
class LayerForm:
    """How a layer keeps tokens; ``window`` tokens reach as far back as it looks, itself included."""

    kind: Literal["rows", "window", "state"]
    window: int = 0
    packed: bool = False


Form = tuple[LayerForm, ...]
"""Of a cache, layer by layer."""


class PromptChunk(Protocol):
    """A chunk of a prompt as a cache holds it."""

    @property
    def has_ends(self) -> bool:
        """Whether the ends of windows and states are there."""
        ...

    def layer(self, index: int) -> Tensors:
        """What layer ``index`` has of it; asked of windows and states only where ``has_ends``."""
        ...

    def drop(self, index: int) -> None:
        """Layer ``index`` is not asked for again: its memory may be free."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkEnds:
    """The ends of windows and states behind a chunk, layer by layer, ``None`` for layers of rows."""

    layers: list[Tensors | None]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return _nbytes(self.layers)


class HeldChunk:
    """A chunk in memory. ``layers`` has ``None`` for ends that are not there, and for what was dropped."""

    def __init__(self, layers: list[Tensors | None], has_ends: bool) -> None:
        self.layers = layers
        self.has_ends = has_ends

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return _nbytes(self.layers)

    def layer(self, index: int) -> Tensors:
        """As of ``PromptChunk``."""
        found = self.layers[index]
        assert found is not None, "asked where it is there"
        return found

    def ends(self, form: Form) -> ChunkEnds | None:
        """The ends alone; ``None`` where they are not there."""
        if not self.has_ends:
            return None
        layers = [
            None if one.kind == "rows" else held
            for one, held in zip(form, self.layers, strict=True)
        ]
        return ChunkEnds(layers)

    def drop(self, index: int) -> None:
        """As of ``PromptChunk``; only for a chunk that nobody else has."""
        self.layers[index] = None


def _nbytes(layers: Sequence[Tensors | None]) -> int:
    return sum(one.nbytes for layer in layers for one in layer or ())


def form_of(model: Any, cache: Any) -> Form | None:
    """The form of the cache of ``model``; ``None`` where it holds something that is not known here."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    fresh = DynamicCache(config=model.config)
    if vars(cache).keys() != vars(fresh).keys() or len(cache.layers) != len(fresh.layers):
        return None
    forms = [_layer_form(layer, model.dtype) for layer in cache.layers]
    plain = [_layer_form(layer, model.dtype) for layer in fresh.layers]
    found: list[LayerForm] = []
    for one, other in zip(forms, plain, strict=True):
        if one is None or other is None or (one.kind, one.window) != (other.kind, other.window):
            return None
        found.append(one)
    return tuple(found)


def form_of_model(model: Any) -> Form | None:
    """The form that the cache of ``model`` has once there is one, as far as its config says."""
    return form_of(model, _fresh(model))


def _fresh(model: Any) -> DynamicCache:
    """An empty cache of ``model``, with the layers that its forwards put in."""
    cache = DynamicCache(config=model.config)
    prepare = pack_in_steps if model.conmoe.kv_precision != "source" else grow_in_steps
    prepare(cache, model.conmoe.context)
    return cache


def _layer_form(layer: Any, dtype: torch.dtype) -> LayerForm | None:
    kind = type(layer)
    if kind in (DynamicLayer, GrowingLayer):
        return LayerForm("rows")
    if kind is DynamicSlidingWindowLayer:
        return _window(layer, packed=False)
    if kind is LinearAttentionLayer:
        return None if layer.record_past else LayerForm("state")
    if kind not in (PackedLayer, PackedWindowLayer):
        return None
    packing: Packing | None = layer.packing
    if packing is not None and packing.dtype != dtype:
        return None
    return LayerForm("rows", packed=True) if kind is PackedLayer else _window(layer, packed=True)


def _window(layer: Any, *, packed: bool) -> LayerForm | None:
    if layer.record_past or layer.sliding_window < 2:
        return None
    return LayerForm("window", layer.sliding_window, packed)


def moves(form: Form) -> bool:
    """Whether some layers forget what a later chunk pushes out."""
    return any(one.kind != "rows" for one in form)


def ends_needed(form: Form, size: int) -> int:
    """Of how many chunks of ``size`` tokens in front of a place the ends are needed to stand there."""
    needed = 0
    for one in form:
        if one.kind == "state":
            needed = max(needed, 1)
        elif one.kind == "window":
            needed = max(needed, -(-(one.window - 1) // size))
    return needed


def standing_at(chunks: Sequence[PromptChunk], form: Form, size: int) -> int:
    """The most of ``chunks`` behind which a cache can stand."""
    needed = ends_needed(form, size)
    for count in range(len(chunks), 0, -1):
        if all(one.has_ends for one in chunks[max(0, count - needed) : count]):
            return count
    return 0


def ends_of(cache: Any, form: Form, size: int) -> ChunkEnds:
    """Copies of the ends of the chunk of ``size`` tokens that ``cache`` has just taken in."""
    found: list[Tensors | None] = []
    for layer, one in zip(cache.layers, form, strict=True):
        if one.kind == "rows":
            found.append(None)
        elif one.kind == "state":
            found.append(tuple(state.clone() for state in _states(layer)))
        elif not layer.is_initialized:
            found.append(())
        else:
            count = min(size, one.window - 1, layer.keys.shape[-2])
            found.append(tuple(_last(held, count).clone() for held in (layer.keys, layer.values)))
    return ChunkEnds(found)


def rows_of(cache: Any, index: int, start: int, end: int) -> Tensors:
    """Views of the tokens from ``start`` to ``end`` in a layer of rows."""
    layer = cache.layers[index]
    if not layer.is_initialized or not layer.keys.numel():
        return ()
    return tuple(held.narrow(-2, start, end - start) for held in (layer.keys, layer.values))


def forget_layer(cache: Any, index: int) -> None:
    """Layer ``index`` holds nothing from now on; the cache is good for nothing else than the next layers."""
    layer = cache.layers[index]
    if isinstance(layer, GrowingLayer):
        layer.forget_buffers()
    layer.keys = layer.values = None
    layer.is_initialized = False


@torch.no_grad()
def cache_of_chunks(
    model: Any, chunks: Sequence[PromptChunk], form: Form, size: int, *, move: bool
) -> DynamicCache:
    """A cache of ``model`` that stands behind ``chunks`` of ``size`` tokens each, where ``standing_at`` allows it.

    ``move``: each chunk drops its layers as they are taken, so that there is no second copy of more than one.
    """
    tokens, cache = len(chunks) * size, _fresh(model)
    for index, one in enumerate(form):
        layer: Any = cache.layers[index]
        if one.kind == "rows":
            _fill_rows(layer, [chunk.layer(index) for chunk in chunks], model.dtype)
        else:
            parts = [chunk.layer(index) for chunk in chunks[-ends_needed((one,), size) :]]
            put_end(layer, one, parts, tokens, model.dtype)
        if move:
            for chunk in chunks:
                chunk.drop(index)
    return cache


def put_end(
    layer: Any, form: LayerForm, parts: Sequence[Tensors], tokens: int, dtype: torch.dtype
) -> None:
    """Let a layer with a window or a state stand behind ``tokens`` tokens, whose last chunks ended as ``parts``."""
    if not parts[-1]:
        return
    if form.kind == "state":
        _set_states(layer, parts[-1])
        return
    held = min(tokens, form.window - 1)
    keys, values = (_last(torch.cat([part[i] for part in parts], -2), held) for i in (0, 1))
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys.contiguous(), values.contiguous()
    layer.cumulative_length = tokens
    if form.packed:
        layer.packing = _packing(keys, values, dtype)


def _fill_rows(layer: Any, parts: Sequence[Tensors], dtype: torch.dtype) -> None:
    if not parts[0]:
        return
    keys, values = [part[0] for part in parts], [part[1] for part in parts]
    if isinstance(layer, GrowingLayer):
        layer.begin_with(keys, values)
    else:
        layer.lazy_initialization(keys[0], values[0])
        layer.keys, layer.values = torch.cat(keys, -2), torch.cat(values, -2)
    if isinstance(layer, PackedLayer):
        layer.packing = _packing(keys[0], values[0], dtype)


def _packing(keys: Tensor, values: Tensor, dtype: torch.dtype) -> Packing:
    return Packing(width_of_row(keys.shape[-1]), width_of_row(values.shape[-1]), dtype)


def width_of_row(nbytes: int) -> int:
    """Numbers in a row of ``nbytes`` bytes (``kv_rows.py``)."""
    width = nbytes * 32 // 33
    while row_bytes(width) > nbytes:
        width -= 1
    while row_bytes(width) < nbytes:
        width += 1
    return width


def _last(held: Tensor, count: int) -> Tensor:
    return held.narrow(-2, held.shape[-2] - count, count)


def _states(layer: Any) -> list[Tensor]:
    """The states of a linear-attention layer: of each number that of the convolution, then the recurrent one; one that
    is not there has no numbers.
    """
    found: list[Tensor] = []
    for i in range(layer.number_of_states):
        for states, there in (
            (layer.conv_states, layer.is_conv_states_initialized),
            (layer.recurrent_states, layer.is_recurrent_states_initialized),
        ):
            found.append(states[i] if there[i] else torch.empty(0))
    return found


def _set_states(layer: Any, given: Tensors) -> None:
    """The reverse of ``_states``; the layer writes to its states in place, so it gets copies."""
    for i in range(layer.number_of_states):
        conv, recurrent = given[2 * i : 2 * i + 2]
        if conv.numel():
            layer.dtype, layer.device = conv.dtype, conv.device
            layer.conv_states[i] = conv.clone()
            layer.conv_kernel_size[i] = conv.shape[-1]
            layer.is_conv_states_initialized[i] = layer.has_previous_state[i] = True
        if recurrent.numel():
            layer.recurrent_states[i] = recurrent.clone()
            layer.is_recurrent_states_initialized[i] = True
