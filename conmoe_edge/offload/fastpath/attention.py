"""A layer's attention for one new token, in one call of the operator.

transformers' attention is some forty tensor operations and method calls a layer. Between two tokens a layer's weights
push everything else out of the processor's caches, so each of them is cold. ``FusedAttention`` stands in front of the
``forward`` of an attention of a listed class (``supported.py``): projections, perhaps norms of queries and keys, rotary
positions, the cache, softmax, the output projection; or the same over compressed keys and values.

Before the operator answers for a layer it has computed one token of that layer beside transformers, and every bit of
the output and of the cache was the same; close where the operator rounds otherwise (``Attention.exact``). That check
is not the proof; the tests of the listed classes are.

Memory: one token's activations; for the first token a copy of the layer's keys and values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from conmoe_edge.compat import CACHE_ARGUMENTS, cache_of
from conmoe_edge.model.attention_in_place import EAGER
from conmoe_edge.model.blocked_attention import BLOCKED
from conmoe_edge.model.kv_rows import unpack_rows
from conmoe_edge.offload.compute.fused_linear import FusedLinear
from conmoe_edge.offload.fastpath.attention_function import SUITED
from conmoe_edge.offload.fastpath.kv_cache import GrowingLayer, widths_of
from conmoe_edge.offload.fastpath.packed_cache import PackedLayer, PackedWindowLayer
from conmoe_edge.offload.fastpath.report import Served, warn_of_another_result
from conmoe_edge.offload.fastpath.rms_norm import FusedNorm
from conmoe_edge.offload.fastpath.supported import Attention, Latent, Refusal, look_up
from conmoe_edge.offload.fastpath.window_cache import has_one_more, room_in_window
from conmoe_edge.offload.kernels.cpu.bindings import (
    AttentionTable,
    Cached,
    LatentTable,
    Operator,
    Positions,
    Prepared,
    RmsNorm,
)

_KNOWN = frozenset(
    (
        *("hidden_states", "position_embeddings", "attention_mask", *CACHE_ARGUMENTS),
        *("position_ids", "cache_position", "use_cache"),  # say nothing that the others do not
    )
)
"""Arguments of a ``forward`` that are looked at, or may have any value."""
_CLOSE = 2.0**-5
"""Of the greatest number of an output: what it may differ by where the operator rounds otherwise."""


@dataclass(frozen=True, slots=True)
class Place:
    """A layer's weights as they lie now, and where the next token goes in a cache."""

    table: AttentionTable | LatentTable
    layer: GrowingLayer | DynamicSlidingWindowLayer
    cached: Cached

    def has_one_more(self) -> None:
        """The token has been written."""
        if isinstance(self.layer, GrowingLayer):
            self.layer.has_one_more(self.cached)
        else:
            has_one_more(self.layer)


class Rehearsal:
    """A copy of what a layer of the cache holds, for a token that transformers computes as well.

    Where the two agree the token is taken back and computed as all later ones are: the sums of the two may differ in
    the last bit, and what a conversation says must not depend on its being the first after a load.
    """

    def __init__(self, layer: Any) -> None:
        """Before that token."""
        self._layer, self._held = layer, layer.keys.shape[-2]
        self._copies = [_with_room(one) for one in (layer.keys, layer.values)]
        self._before = dict(vars(layer))

    def take_back(self) -> None:
        """Let the layer hold what it held before the token, where it lay."""
        state = vars(self._layer)
        state.clear()
        state.update(self._before)

    def agrees(self, compute: Callable[[Cached], Tensor], wanted: Tensor, exact: bool) -> bool:
        """Whether ``compute`` gives what is ``wanted``, and writes the keys and values that transformers has written:
        the same bits where ``exact``, else close.
        """
        widths = widths_of(self._layer)
        found = compute(Cached.of(self._copies[0], self._copies[1], self._held, widths))
        same = torch.equal if exact else _close
        own = (self._layer.keys, self._layer.values)
        if not same(found, wanted):
            return False
        for copy, one, width in zip(self._copies, own, widths or (None, None), strict=True):
            rows = [tensor[:, :, -1] for tensor in (copy, one)]
            if width is not None and not exact:
                rows = [unpack_rows(row, width, torch.bfloat16) for row in rows]
            if not same(*rows):
                return False
        return True


def _with_room(held: Tensor) -> Tensor:
    longer = held.new_zeros((*held.shape[:-2], held.shape[-2] + 1, held.shape[-1]))
    longer[:, :, :-1] = held
    return longer


class FusedAttention:
    """Stands in front of the ``forward`` of an attention module of a loaded model, for inference only.

    ``verified``: whether the operator computed the same as transformers; ``None`` before there was a token to try.
    ``windows``: whether it takes cache layers with a window.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: Attention | Latent,
        linears: list[str],
        norms: list[str],
        engine: Operator,
        served: Served,
    ) -> None:
        """For a module that ``fused_attention`` takes; names of its projections and norms, empty for none."""
        self.verified: bool | None = None
        self.spec, self.exact = spec, spec.exact
        self._own = weakref.WeakMethod(module.forward)
        self._engine, self._served = engine, served
        self._parts = parts = dict(module.named_children())
        self._linears: list[FusedLinear] = [parts[name] for name in linears]  # pyright: ignore[reportAttributeAccessIssue]
        self._norms: list[FusedNorm | None] = [parts.get(name) for name in norms]  # pyright: ignore[reportAttributeAccessIssue]
        self._index = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
        self._config: Any = module.config
        self._settings: dict[str, Any] = vars(self._config)
        self._implementation: str = self._config._attn_implementation
        self._table: AttentionTable | LatentTable | None = None
        self._prepared: list[Prepared | None] = []
        self._eager = isinstance(spec, Attention) and spec.eager
        self.windows = isinstance(spec, Attention) and spec.windows
        self._unset = spec.unset if isinstance(spec, Attention) else ()
        sinks = spec.sinks if isinstance(spec, Attention) else ""
        self._sinks: Tensor | None = getattr(module, sinks) if sinks else None
        self._sinks_place = 0 if self._sinks is None else self._sinks.data_ptr()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """transformers' interface: [B, T, H] ... -> ([B, T, H], none or the attention's weights)."""
        own = self._own()
        assert own is not None, "the module is being called, so it is there"
        x = kwargs.get("hidden_states")
        if args or x is None or self.verified is False or self._eager or not self.takes(x, kwargs):
            return own(*args, **kwargs)
        place = self.place(cache_of(kwargs))
        if place is None or x.numel() != place.table.hidden:
            return own(**kwargs)
        positions = self.positions(kwargs, place)
        if positions is None:
            return own(**kwargs)
        if self.verified is None:
            rehearsal, found = Rehearsal(place.layer), own(**kwargs)
            self.verified = found[1] is None and rehearsal.agrees(
                lambda cached: self._engine.attention(place.table, x, positions, cached),
                found[0],
                self.exact,
            )
            if not self.verified:
                warn_of_another_result(own.__self__)
                return found
            rehearsal.take_back()
        out = self._engine.attention(place.table, x, positions, place.cached)
        place.has_one_more()
        self._served.attention += 1
        return out, None

    @property
    def is_as_it_was(self) -> bool:
        """Whether the model attends in the way that it was loaded with."""
        return self._config._attn_implementation == self._implementation

    @property
    def settings_hold(self) -> bool:
        """Whether the configuration still says what it has to."""
        return self.is_as_it_was and all(self._settings.get(name) is None for name in self._unset)

    def takes(self, x: Tensor, arguments: Mapping[str, Any]) -> bool:
        """Whether ``x`` is one token in a format of the operator, and the ``arguments`` of the module's ``forward`` ask
        for nothing that it does not do.
        """
        if x.shape[:2] != (1, 1) or x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return False
        if not x.is_contiguous() or not self.is_as_it_was:
            return False
        for name, value in arguments.items():
            if name not in _KNOWN and value is not None and value is not False:
                return False
        mask = arguments.get("attention_mask")
        return mask is None or (self.windows and _hides_nothing(mask))

    def positions(self, arguments: Mapping[str, Any], place: Place) -> Positions | None:
        """The token's position among the ``arguments``; ``None`` where it is not what the table takes."""
        given = arguments.get("position_embeddings")
        try:
            if isinstance(given, Tensor):
                found = Positions.of_complex(given[0])
            elif given is None or len(given) != 2:
                return None
            elif isinstance(self.spec, Attention) and self.spec.half_angles:
                found = Positions.of_half(*given)
            else:
                found = Positions(*given)
            place.table.turning.angles(found)
        except ValueError:
            return None
        return found

    def place(self, cache: Any) -> Place | None:
        """The layer's weights, and the place of another token in ``cache``; ``None`` where the operator may not be
        asked.
        """
        table = self._current()
        return None if table is None else self.place_with(table, cache)

    def place_with(self, table: AttentionTable | LatentTable, cache: Any) -> Place | None:
        """``place``, where the weights still lie as ``table`` says."""
        if type(cache) is not DynamicCache or self._index >= len(cache.layers):
            return None
        layer: Any = cache.layers[self._index]
        if type(layer) in (GrowingLayer, PackedLayer):
            cached = layer.room_for_one(*table.cache)
        elif type(layer) in (DynamicSlidingWindowLayer, PackedWindowLayer) and self.windows:
            cached = room_in_window(layer, *table.cache)
        else:
            return None
        return None if cached is None else Place(table, layer, cached)

    def _current(self) -> AttentionTable | LatentTable | None:
        """The layer as its weights lie now; ``None`` where a part was exchanged or has hooks."""
        own = self._own()
        if own is None or own.__self__.training or not unchanged(own.__self__, self._parts):
            return None
        for name in self._unset:
            if self._settings.get(name) is not None:
                return None
        if self._sinks is not None and self._sinks.data_ptr() != self._sinks_place:
            return None
        for one in self._norms:
            if one is not None and one.current() is None:
                return None
        prepared = [one.prepared_for(torch.bfloat16) for one in self._linears]
        if self._table is None or any(
            one is not other for one, other in zip(prepared, self._prepared, strict=True)
        ):
            norms = [None if one is None else one.current() for one in self._norms]
            self._prepared = prepared
            self._table = self._tabled(own.__self__, prepared, norms)
        return self._table

    def _tabled(
        self, module: Any, prepared: list[Prepared | None], norms: list[RmsNorm | None]
    ) -> AttentionTable | LatentTable | None:
        linears: list[tuple[Prepared, Tensor | None]] = []
        for one, linear in zip(prepared, self._linears, strict=True):
            bias = linear.bias
            if one is None or (bias is not None and bias.dtype != torch.bfloat16):
                return None
            linears.append((one, None if bias is None else bias.detach()))
        make = _plain if isinstance(self.spec, Attention) else _latent
        try:
            return make(module, self.spec, linears, norms)  # pyright: ignore[reportArgumentType]
        except ValueError:
            return None


def _plain(
    module: Any,
    spec: Attention,
    linears: list[tuple[Prepared, Tensor | None]],
    norms: list[RmsNorm | None],
) -> AttentionTable:
    sinks = getattr(module, spec.sinks) if spec.sinks else None
    gates = [matrix for matrix, bias in linears[4:] if bias is None]
    if len(gates) != len(linears[4:]):
        raise ValueError("a gate with a bias")
    return AttentionTable(
        linears[:4],
        norms or [None, None],
        int(module.head_dim),
        float(module.scaling),
        turn=spec.turn if _turns(module, spec) else "not",
        late=spec.late,
        value_width=int(getattr(module, spec.value_width)) if spec.value_width else None,
        value_scale=float(getattr(module, spec.value_scale)) if spec.value_scale else 1.0,
        doubled=spec.doubled,
        gate=gates[0] if gates else None,
        eager=spec.eager,
        sinks=None if sinks is None else sinks.detach(),
    )


def _turns(module: Any, spec: Attention) -> bool:
    if spec.turn_unless and getattr(module, spec.turn_unless) is None:
        return True
    return bool(getattr(module, spec.turn_if)) if spec.turn_if else True


def _latent(
    module: Any,
    spec: Latent,
    linears: list[tuple[Prepared, Tensor | None]],
    norms: list[RmsNorm | None],
) -> LatentTable:
    query, compress, expand, output, *before = linears
    (norm, *query_norm) = norms
    if norm is None or query[1] is not None or expand[1] is not None:
        raise ValueError("biases that the operator does not take")
    return LatentTable(
        query[0],
        compress,
        norm,
        expand[0],
        output,
        heads=int(module.num_heads),
        turned=int(module.qk_rope_head_dim),
        value_width=int(module.v_head_dim),
        scaling=float(module.scaling),
        turn=spec.turn if not spec.turn_if or getattr(module.config, spec.turn_if) else "halves",
        compress_query=before[0] if before else None,
        query_norm=query_norm[0] if query_norm else None,
    )


def _hides_nothing(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())


def unchanged(module: nn.Module, parts: dict[str, nn.Module], called: Collection[str] = ()) -> bool:
    """Whether the children of ``module`` are still ``parts``, and none has a hook but those ``called`` anyway."""
    if module._modules != parts:
        return False
    for part in parts.values():
        if part._forward_hooks or part._forward_pre_hooks:
            break
    else:
        return True
    return not any(
        name not in called and (part._forward_hooks or part._forward_pre_hooks)
        for name, part in parts.items()
    )


def _close(found: Tensor, wanted: Tensor) -> bool:
    far = (found.float() - wanted.float()).abs().max()
    return bool(far <= _CLOSE * wanted.float().abs().max())


def fused_attention(
    module: nn.Module, engine: Operator, served: Served
) -> FusedAttention | Refusal:
    """What stands in front of ``module``'s ``forward``, whose projections and norms are the operator's already."""
    spec = look_up(module, Attention)
    if isinstance(spec, Refusal):
        latent = look_up(module, Latent)
        if isinstance(latent, Refusal):
            return spec if spec.reason else latent
        return _fused(module, latent, *_latent_parts(module), engine, served)
    for setting in spec.unset:
        if getattr(module.config, setting) is not None:
            return Refusal(f"{type(module).__name__} with {setting}")
    norms = spec.norms if not spec.norms_if or getattr(module, spec.norms_if) else ()
    linears = [*spec.linears, *([spec.gate] if spec.gate else [])]
    return _fused(module, spec, linears, list(norms), engine, served)


def _latent_parts(module: nn.Module) -> tuple[list[str], list[str]]:
    linears, norms = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], ["kv_a_layernorm"]
    if module.q_lora_rank is None:
        return linears, norms
    return ["q_b_proj", *linears[1:], "q_a_proj"], [*norms, "q_a_layernorm"]


def _fused(
    module: nn.Module,
    spec: Attention | Latent,
    linears: list[str],
    norms: list[str],
    engine: Operator,
    served: Served,
) -> FusedAttention | Refusal:
    name, children = type(module).__name__, dict(module.named_children())
    eager = isinstance(spec, Attention) and spec.eager
    implementation = module.config._attn_implementation  # pyright: ignore[reportAttributeAccessIssue]
    if implementation not in ((EAGER, BLOCKED) if eager else (SUITED,)):
        return Refusal(f"its attention is {implementation}")
    if set(children) != {*linears, *norms}:
        return Refusal(f"{name} has other parts than its class")
    if not all(isinstance(children[one], FusedLinear) for one in linears):
        return Refusal(f"a projection of {name} is not the operator's")
    if not all(isinstance(children[one], FusedNorm) for one in norms):
        return Refusal(f"a norm of {name} is not the operator's")
    return FusedAttention(module, spec, linears, norms, engine, served)
