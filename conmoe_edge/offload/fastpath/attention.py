"""A layer's attention for one new token, in one call of the operator.

transformers' attention is some forty tensor operations and method calls a layer. Between two tokens a layer's weights
push everything else out of the processor's caches, so each of them is cold. ``attend_in_one_call`` puts an
``EdgeAttention`` in front of the ``forward`` of every attention that is the usual one: projections, perhaps norms of
queries and keys, rotary positions, the cache, softmax, the output projection.

Nothing is known of a model's own class. Its code must use no name beyond those of the usual attention
(``class_match.py``), and before the operator answers for a layer it has computed a token of that layer beside
transformers, and every bit of the output and of the cache was the same.

Memory: one token's activations; for the first token a copy of the layer's keys and values. Raises nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from conmoe_edge.offload.compute.fused_linear import EdgeLinear
from conmoe_edge.offload.fastpath.class_match import as_they_were, speaks_only_of
from conmoe_edge.offload.fastpath.kv_cache import GrowingLayer
from conmoe_edge.offload.fastpath.rms_norm import EdgeNorm
from conmoe_edge.offload.kernels.cpu.bindings import (
    AttentionTable,
    Cached,
    Operator,
    Positions,
    Prepared,
    RmsNorm,
)

_ARGUMENTS = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_NAMES = frozenset(
    [
        *_LINEARS,
        *_NORMS,
        *("head_dim", "shape", "view", "transpose", "reshape", "contiguous", "config", "training"),
        *("apply_rotary_pos_emb", "update", "layer_idx", "scaling", "sliding_window", "getattr"),
        *("ALL_ATTENTION_FUNCTIONS", "get_interface", "_attn_implementation"),
        *("eager_attention_forward", "attention_dropout", "use_qk_norm"),
    ]
)
"""What the code of the usual attention speaks of, in transformers' words."""
_UNUSED = {"clip_qkv": ("clip_qkv", "clamp_")}
"""Names that are as good as not there where the model's configuration has nothing under the first."""
_HARMLESS = frozenset(("position_ids", "cache_position", "use_cache"))
"""Arguments that say nothing which the others do not."""


@dataclass(frozen=True, slots=True)
class Place:
    """A layer's weights as they lie now, and where the next token goes in a cache."""

    table: AttentionTable
    layer: GrowingLayer
    cached: Cached


class EdgeAttention:
    """Stands in front of the ``forward`` of an attention module of a loaded model, for inference only.

    ``agrees``: whether the operator computed the same as transformers; ``None`` before there was a token to try.
    """

    def __init__(self, module: nn.Module, engine: Operator) -> None:
        """For a module that ``is_usual_attention``."""
        self.agrees: bool | None = None
        self._own = weakref.WeakMethod(module.forward)
        self._engine = engine
        self._parts = dict(module.named_children())
        self._linears: list[EdgeLinear] = [getattr(module, name) for name in _LINEARS]
        self._norms: list[EdgeNorm | None] = [getattr(module, name, None) for name in _NORMS]
        self._width, self._scaling = int(module.head_dim), float(module.scaling)  # pyright: ignore[reportArgumentType]
        self._index = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
        self._config: Any = module.config
        self._implementation: str = self._config._attn_implementation
        self._table: AttentionTable | None = None
        self._prepared: list[Prepared | None] = []

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """transformers' interface: [B, T, H] ... -> ([B, T, H], none or the attention's weights)."""
        own = self._own()
        assert own is not None, "the module is being called, so it is there"
        x = kwargs.get("hidden_states")
        if args or x is None or self.agrees is False or not self.takes(x, kwargs):
            return own(*args, **kwargs)
        place = self.place(kwargs["past_key_values"])
        if place is None:
            return own(**kwargs)
        positions = Positions(*kwargs["position_embeddings"])
        if self.agrees is None:
            found = own(**kwargs)
            self.agrees = found[1] is None and agree(
                place, lambda cached: self._gives(found[0], place, x, positions, cached)
            )
            return found
        out = self._engine.attention(place.table, x, positions, place.cached)
        place.layer.has_one_more()
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
            known = name in _HARMLESS or (name in _ARGUMENTS and name != "attention_mask")
            if not known and value is not None and value is not False:
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
        """The layer as its weights lie now; ``None`` where a part was exchanged or is watched."""
        own = self._own()
        if own is None or not as_they_were(own.__self__, self._parts):
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


def attend_in_one_call(model: PreTrainedModel, engine: Operator) -> int:
    """Let the usual attentions of ``model`` take single tokens through the operator; how many there are."""
    found = [module for module in model.modules() if is_usual_attention(module)]
    for module in found:
        module.forward = EdgeAttention(module, engine)  # type: ignore[method-assign]
    return len(found)


def is_usual_attention(module: nn.Module) -> bool:
    """Whether the code and the parts of ``module`` are those of the usual attention and nothing else."""
    children = dict(module.named_children())
    if not set(_LINEARS) <= set(children) <= {*_LINEARS, *_NORMS}:
        return False
    norms = [children.get(name) for name in _NORMS]
    if not all(isinstance(children[name], EdgeLinear) for name in _LINEARS):
        return False
    if any(one is not None and not isinstance(one, EdgeNorm) for one in norms):
        return False
    if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
        return False
    config = getattr(module, "config", None)
    if config is None or not all(hasattr(module, name) for name in ("head_dim", "scaling")):
        return False
    unused = [
        one for name, used in _UNUSED.items() if getattr(config, name, None) is None for one in used
    ]
    return speaks_only_of(module, {*_NAMES, *unused}, _ARGUMENTS)
