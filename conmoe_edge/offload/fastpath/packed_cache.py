"""Layers of a key-value cache that hold 8 bits a number (``--kv-precision int8``).

``keys`` and ``values`` are the whole state, as in every cache layer of transformers, but they are rows of bytes
[B, heads, tokens, row_bytes(width)] (``model/kv_rows.py``): what comes in is packed, and what attention is given is
expanded again, the tokens that came in as well. So a token's keys are the same numbers in the forward that makes them
and in every later one, whatever the chunks, and cropping, beam search and ``generate`` work on rows as on numbers. The
operator reads the rows as they lie (``attention.py``).

For inference: no gradient goes through a row.

Memory: the rows; while attention of many tokens runs, one layer's numbers expanded (``plan/needs.py`` counts them).
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from conmoe_edge.errors import UsageError
from conmoe_edge.model.kv_rows import pack_rows
from conmoe_edge.model.packed_layers import PackedUpdate, Packing
from conmoe_edge.offload.fastpath.kv_cache import LIMIT, GrowingLayer


class PackedLayer(PackedUpdate, GrowingLayer):
    """A layer that keeps every token."""


class PackedWindowLayer(PackedUpdate, DynamicSlidingWindowLayer):
    """A layer that keeps the last tokens."""


def pack_in_steps(cache: Any, limit: int) -> None:
    """Swap the layers of ``cache`` for layers in 8 bits; what they hold already is packed.

    Raises:
        UsageError: the cache is not transformers' general one, or has layers of another kind.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        raise _refused(type(cache).__name__)
    if cache.layer_class_to_replicate is DynamicLayer:
        made: Any = functools.partial(PackedLayer, limit)
        cache.layer_class_to_replicate = made
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        kind = type(layer)
        if kind is PackedLayer:
            continue
        if kind is PackedWindowLayer:
            setattr(layer, LIMIT, limit)
        elif kind in (DynamicLayer, GrowingLayer):
            layers[i] = _filled(PackedLayer(limit), layer, limit)
        elif kind is DynamicSlidingWindowLayer:
            own = PackedWindowLayer(layer.sliding_window)
            setattr(own, LIMIT, limit)
            layers[i] = _filled(own, layer, limit)
        elif isinstance(layer, DynamicLayer):
            raise _refused(kind.__name__)


def _filled(own: Any, layer: Any, limit: int) -> Any:
    """``own`` with the state of ``layer``."""
    keys, values = layer.keys, layer.values
    if not layer.is_initialized or not keys.numel():
        return own
    kept = {name: one for name, one in vars(layer).items() if not name.startswith("_conmoe")}
    vars(own).update(kept)
    own.packing = Packing.of(keys, values)
    own.keys, own.values = pack_rows(keys), pack_rows(values)
    if isinstance(own, GrowingLayer):
        own.forget_buffers()
        own.limit = limit
    return own


def _refused(name: str) -> UsageError:
    return UsageError(
        f"A {name} does not hold keys and values in 8 bits.",
        "the package was loaded with a key-value cache in 8 bits, and answers would not be the same",
        "leave the cache to the model, or load with kv_precision='source'",
    )
