"""A layer's attention for one new token, in one call of the operator.

transformers' attention is some forty tensor operations and method calls a layer. Between two tokens a layer's weights
push everything else out of the processor's caches, so each of them is cold. ``FusedAttention`` stands in front of the
``forward`` of an attention of a listed class (``supported.py``): projections, perhaps norms of queries and keys, rotary
positions, the cache, softmax, the output projection.

Before the operator answers for a layer it has computed one token of that layer beside transformers, and every bit of
the output and of the cache was the same. That check is not the proof; the tests of the listed classes are.

Memory: one token's activations; for the first token a copy of the layer's keys and values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from conmoe_edge.compat import CACHE_ARGUMENTS, cache_of
from conmoe_edge.offload.compute.fused_linear import FusedLinear
from conmoe_edge.offload.fastpath.kv_cache import GrowingLayer
from conmoe_edge.offload.fastpath.report import Served
from conmoe_edge.offload.fastpath.rms_norm import FusedNorm
from conmoe_edge.offload.fastpath.supported import Attention, Refusal, look_up
from conmoe_edge.offload.kernels.cpu.bindings import (
    AttentionTable,
    Cached,
    Operator,
    Positions,
    Prepared,
    RmsNorm,
)

_KNOWN = frozenset(
    (
        *("hidden_states", "position_embeddings", *CACHE_ARGUMENTS),
        *("position_ids", "cache_position", "use_cache"),  # say nothing that the others do not
    )
)
"""Arguments of a ``forward`` that may have any value."""


@dataclass(frozen=True, slots=True)
class Place:
    """A layer's weights as they lie now, and where the next token goes in a cache."""

    table: AttentionTable
    layer: GrowingLayer
    cached: Cached


class FusedAttention:
    """Stands in front of the ``forward`` of an attention module of a loaded model, for inference only.

    ``verified``: whether the operator computed the same as transformers; ``None`` before there was a token to try.
    """

    def __init__(
        self, module: nn.Module, spec: Attention, engine: Operator, served: Served
    ) -> None:
        """For a module that ``fused_attention`` takes."""
        self.verified: bool | None = None
        self._own = weakref.WeakMethod(module.forward)
        self._spec, self._engine, self._served = spec, engine, served
        self._parts = dict(module.named_children())
        self._linears: list[FusedLinear] = [self._parts[name] for name in spec.linears]  # pyright: ignore[reportAttributeAccessIssue]
        norms: list[Any] = [self._parts.get(name) for name in spec.norms]
        self._norms: list[FusedNorm | None] = norms or [None, None]
        self._width, self._scaling = int(module.head_dim), float(module.scaling)  # pyright: ignore[reportArgumentType]
        self._index = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
        self._config: Any = module.config
        self._settings: dict[str, Any] = vars(self._config)
        self._implementation: str = self._config._attn_implementation
        self._table: AttentionTable | None = None
        self._prepared: list[Prepared | None] = []

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """transformers' interface: [B, T, H] ... -> ([B, T, H], none or the attention's weights)."""
        own = self._own()
        assert own is not None, "the module is being called, so it is there"
        x = kwargs.get("hidden_states")
        if args or x is None or self.verified is False or not self.takes(x, kwargs):
            return own(*args, **kwargs)
        place = self.place(cache_of(kwargs))
        if place is None or x.numel() != place.table.hidden:
            return own(**kwargs)
        positions = Positions(*kwargs["position_embeddings"])
        if self.verified is None:
            found = own(**kwargs)
            self.verified = found[1] is None and agree(
                place, lambda cached: self._gives(found[0], place, x, positions, cached)
            )
            return found
        out = self._engine.attention(place.table, x, positions, place.cached)
        place.layer.has_one_more()
        self._served.attention += 1
        return out, None

    def _gives(self, wanted: Tensor, place: Place, *arguments: Any) -> bool:
        return torch.equal(self._engine.attention(place.table, *arguments), wanted)

    def takes(self, x: Tensor, arguments: Mapping[str, Any]) -> bool:
        """Whether ``x`` is one token in a format of the operator, and the ``arguments`` of the module's ``forward`` ask
        for nothing that it does not do.
        """
        positions = arguments.get("position_embeddings")
        if x.shape[:2] != (1, 1) or positions is None or len(positions) != 2:
            return False
        if self._config._attn_implementation != self._implementation:
            return False
        for name, value in arguments.items():
            if name not in _KNOWN and value is not None and value is not False:
                return False
        cos, sin = positions
        for one in (x, cos, sin):
            if one.dtype != torch.bfloat16 or one.device.type != "cpu" or not one.is_contiguous():
                return False
        return cos.numel() == sin.numel() == cos.shape[-1] <= self._width and not cos.numel() % 2

    def place(self, cache: Any) -> Place | None:
        """The layer's weights, and the place of another token in ``cache``; ``None`` where the operator may not be
        asked.
        """
        if type(cache) is not DynamicCache or self._index >= len(cache.layers):
            return None
        layer, table = cache.layers[self._index], self._current()
        if table is None or type(layer) is not GrowingLayer:
            return None
        cached = layer.room_for_one(table.groups, table.width)
        return None if cached is None else Place(table, layer, cached)

    def _current(self) -> AttentionTable | None:
        """The layer as its weights lie now; ``None`` where a part was exchanged or has hooks."""
        own = self._own()
        if own is None or own.__self__.training or not unchanged(own.__self__, self._parts):
            return None
        if any(self._settings.get(name) is not None for name in self._spec.unset):
            return None
        norms = [None if one is None else one.current() for one in self._norms]
        for norm, one in zip(norms, self._norms, strict=True):
            if norm is None and one is not None:
                return None
        prepared = [one.prepared_for(torch.bfloat16) for one in self._linears]
        if self._table is None or any(
            one is not other for one, other in zip(prepared, self._prepared, strict=True)
        ):
            self._prepared = prepared
            self._table = self._tabled(prepared, norms)
        return self._table

    def _tabled(
        self, prepared: list[Prepared | None], norms: list[RmsNorm | None]
    ) -> AttentionTable | None:
        linears = []
        for one, linear in zip(prepared, self._linears, strict=True):
            bias = linear.bias
            if one is None or (bias is not None and bias.dtype != torch.bfloat16):
                return None
            linears.append((one, None if bias is None else bias.detach()))
        try:
            return AttentionTable(linears, norms, self._width, self._scaling)
        except ValueError:
            return None


def unchanged(module: nn.Module, parts: dict[str, nn.Module], called: Collection[str] = ()) -> bool:
    """Whether the children of ``module`` are still ``parts``, and none has a hook but those ``called`` anyway."""
    children = module._modules
    if len(children) != len(parts):
        return False
    for name, part in parts.items():
        hooked = part._forward_hooks or part._forward_pre_hooks
        if children.get(name) is not part or (hooked and name not in called):
            return False
    return True


def agree(place: Place, compute: Callable[[Cached], bool]) -> bool:
    """Whether ``compute`` says so, and writes the same keys and values as the token has in the cache already."""
    keys: Any = place.layer.keys
    values: Any = place.layer.values
    own = [one.clone(memory_format=torch.contiguous_format) for one in (keys, values)]
    for one in own:
        one[:, :, -1] = 0
    first, second = own
    same = compute(Cached.of(first, second, keys.shape[2] - 1))
    return same and torch.equal(first, keys) and torch.equal(second, values)


def fused_attention(
    module: nn.Module, engine: Operator, served: Served
) -> FusedAttention | Refusal:
    """What stands in front of ``module``'s ``forward``, whose projections and norms are the operator's already."""
    spec = look_up(module, Attention)
    if isinstance(spec, Refusal):
        return spec
    name, children = type(module).__name__, dict(module.named_children())
    norms = spec.norms if not spec.norms_if or getattr(module, spec.norms_if) else ()
    if set(children) != {*spec.linears, *norms}:
        return Refusal(f"{name} has other parts than its class")
    if not all(isinstance(children[one], FusedLinear) for one in spec.linears):
        return Refusal(f"a projection of {name} is not the operator's")
    if not all(isinstance(children[one], FusedNorm) for one in norms):
        return Refusal(f"a norm of {name} is not the operator's")
    for setting in spec.unset:
        if getattr(module.config, setting) is not None:
            return Refusal(f"{name} with {setting}")
    return FusedAttention(module, spec, engine, served)
