"""A usual decoder layer for one new token, in one call of the operator wherever all its prototypes are there.

That is norm, attention, sum, norm, router (``router.py``), experts (``cpu_layer.py``), sum. Where the router has
chosen a prototype that is not there, the call ends before the experts, and they go through the cache. Where the router
is another one, or somebody watches it, it is called as the model has it, between two calls of the operator; and so is
what else may stand behind the second norm: a dense layer, shared experts, experts that the operator does not take.
Every step in Python and every small tensor operation that is saved is a cold one (``attention.py``).

As there, a model's class is not known: the layer's code uses no name but those of its parts, and a token has been
computed both ways, to the same bits, before the operator answers.

Memory: as ``attention.py``. Raises nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conmoe_edge.offload.compute.cpu_layer import CpuLayer
from conmoe_edge.offload.compute.experts_forward import HANDLE, LayerHandle
from conmoe_edge.offload.fastpath.attention import EdgeAttention, Place, agree
from conmoe_edge.offload.fastpath.class_match import as_they_were, speaks_only_of
from conmoe_edge.offload.fastpath.rms_norm import EdgeNorm
from conmoe_edge.offload.fastpath.router import EdgeRouter
from conmoe_edge.offload.kernels.cpu.bindings import (
    AttentionTable,
    BlockTable,
    Cached,
    Operator,
    Positions,
    RouterTable,
)

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_BLOCK = ("gate", "experts")
_BLOCK_NAMES = (*_BLOCK, "shape", "view", "reshape")
_JITTER = ("jitter_noise", "training", "torch", "empty_like", "uniform_")
"""Names of noise on a router's input, as good as not there where it is 0."""


@dataclass(frozen=True, slots=True)
class _Experts:
    """A block of experts that is nothing but its router and its experts."""

    block: nn.Module
    parts: dict[str, nn.Module]

    @classmethod
    def of(cls, block: nn.Module) -> _Experts | None:
        parts = dict(block.named_children())
        if set(parts) != set(_BLOCK) or not isinstance(
            getattr(parts["experts"], HANDLE, None), LayerHandle
        ):
            return None
        names = {*_BLOCK_NAMES, *(_JITTER if getattr(block, "jitter_noise", None) == 0 else ())}
        if list(block.parameters(recurse=False)) or not speaks_only_of(block, names):
            return None
        return cls(block, parts)

    def router(self) -> RouterTable | None:
        """The usual router, which nobody watches; a forward of the model may begin with letting somebody."""
        gate = self.parts["gate"]
        edge = gate.__dict__.get("forward")
        if type(edge) is not EdgeRouter or gate._forward_hooks or gate._forward_pre_hooks:
            return None
        return edge.current()

    def whole(self) -> CpuLayer | None:
        """Its experts, where the operator takes them."""
        handle: LayerHandle = getattr(self.parts["experts"], HANDLE)
        if handle.backend is None or not as_they_were(self.block, self.parts, called=("gate",)):
            return None
        found = handle.experts(self.parts["experts"])
        if not isinstance(found, CpuLayer) or found.table is None:
            return None
        return found if torch.bfloat16 in found.formats else None


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a layer needs for the next token, but for its activations."""

    cache: Any
    place: Place
    table: BlockTable
    whole: CpuLayer | None


class _Taken:
    """Arguments of a layer that were looked at, and taken: a model gives all its layers the same."""

    def __init__(self) -> None:
        self._embeddings: Any = None
        self._count = 0
        self.positions: Positions | None = None

    def same(self, arguments: Mapping[str, Any]) -> bool:
        embeddings = arguments.get("position_embeddings")
        return (
            embeddings is not None
            and embeddings is self._embeddings
            and len(arguments) == self._count
            and arguments.get("attention_mask") is None
        )

    def keep(self, arguments: Mapping[str, Any]) -> None:
        self._embeddings, self._count = arguments["position_embeddings"], len(arguments)
        self.positions = Positions(*self._embeddings)


class EdgeLayer:
    """Stands in front of the ``forward`` of a decoder layer of a loaded model, for inference only.

    ``agrees``: whether the operator computed the same as transformers; ``None`` before there was a token to try.
    """

    def __init__(self, module: nn.Module, engine: Operator, taken: _Taken) -> None:
        """For a module that ``is_usual_layer``."""
        self.agrees: bool | None = None
        self._tried_whole = False
        self._own = weakref.WeakMethod(module.forward)
        self._engine, self._taken = engine, taken
        self._parts = dict(module.named_children())
        self._before: EdgeNorm = self._parts["input_layernorm"]  # type: ignore[assignment]
        self._after: EdgeNorm = self._parts["post_attention_layernorm"]  # type: ignore[assignment]
        self._attention: EdgeAttention = vars(self._parts["self_attn"])["forward"]
        self._mlp = self._parts["mlp"]
        self._experts = _Experts.of(self._mlp)
        self._table: tuple[AttentionTable, BlockTable] | None = None
        self._ready: _Ready | None = None
        self._written: _Ready | None = None

    def prepare(self, cache: Any) -> None:
        """For a token that comes next, behind those in ``cache``; with ``None`` for anything else."""
        self._ready = self._written = None
        own = self._own()
        if cache is None or own is None or self.agrees is False or self._attention.agrees is False:
            return
        before, after = self._before.current(), self._after.current()
        place = self._attention.place(cache)
        if before is None or after is None or place is None:
            return
        if not as_they_were(own.__self__, self._parts):
            return
        if self._table is None or self._table[0] is not place.table:
            try:
                self._table = (place.table, BlockTable(place.table, before, after))
            except ValueError:
                self.agrees = False
                return
        whole = None if self._experts is None else self._experts.whole()
        if self._tried_whole != (whole is not None):
            self._tried_whole, self.agrees = whole is not None, None
        self._ready = _Ready(cache, place, self._table[1], whole)

    def finish(self, through: bool) -> None:
        """The forward has ended. Where the token went ``through`` the whole model, it is in the cache."""
        if through and self._written is not None:
            self._written.place.layer.has_one_more()
        self._ready = self._written = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' interface: [B, T, H] ... -> [B, T, H]."""
        ready, self._ready = self._ready, None
        own = self._own()
        assert own is not None, "the module is being called, so it is there"
        if ready is None or len(args) != 1 or kwargs.get("past_key_values") is not ready.cache:
            return own(*args, **kwargs)
        x: Tensor = args[0]
        if not self._taken.same(kwargs):
            if not self._attention.takes(x, kwargs):
                return own(*args, **kwargs)
            self._taken.keep(kwargs)
        if x.dtype != torch.bfloat16 or x.numel() != ready.place.table.hidden:
            return own(*args, **kwargs)
        if self._parts["self_attn"].__dict__.get("forward") is not self._attention:
            return own(*args, **kwargs)  # somebody has begun to watch it
        positions = self._taken.positions
        assert positions is not None
        if self.agrees is None:
            return self._try(lambda: own(*args, **kwargs), x, positions, ready)
        out = self._compute(x.contiguous(), positions, ready, ready.place.cached)
        self._written = ready
        return out

    def _try(self, own: Callable[[], Any], x: Tensor, positions: Positions, ready: _Ready) -> Any:
        """The token by transformers, and beside it by the operator with what the router said (or with what stands in
        the experts' place gave), to see whether they are the same.
        """
        routed: list[Any] = []
        known = (
            self._mlp
            if self._experts is None or ready.whole is None
            else self._experts.parts["gate"]
        )
        hook = known.register_forward_hook(lambda *call: routed.append(call[2]))
        try:
            wanted = own()
        finally:
            hook.remove()

        def compute(cached: Cached) -> bool:
            found = self._compute(x.contiguous(), positions, ready, cached, routed[0])
            return torch.equal(found, wanted)

        usual = isinstance(wanted, Tensor) and len(routed) == 1
        self.agrees = usual and agree(ready.place, compute)
        return wanted

    def _compute(
        self,
        x: Tensor,
        positions: Positions,
        ready: _Ready,
        cached: Cached,
        known: Any = None,
    ) -> Tensor:
        """``known``: what another router, or what stands in the experts' place, has given already."""
        experts, whole = self._experts, ready.whole
        if experts is None or whole is None:
            summed, normed = self._engine.block(ready.table, x, positions, cached)
            return summed + (self._mlp(normed) if known is None else known)
        router = experts.router()
        if router is not None:
            out = whole.decoder(ready.table, router, x, positions, cached)
            if out is not None:
                return out
            found = router.between
            given = whole.forward_with_misses(
                experts.parts["experts"], found.normed, found.slots, found.gates
            )
            return (found.summed + given).view(x.shape)
        summed, normed = self._engine.block(ready.table, x, positions, cached)
        flat = normed.view(1, -1)
        routed = experts.parts["gate"](flat) if known is None else known
        out = whole.output(flat, routed[2], routed[1], summed)
        if out is None:
            module = experts.parts["experts"]
            out = summed + whole.forward_with_misses(module, flat, routed[2], routed[1])
        return out.view(x.shape)


class Layers:
    """The usual layers of a model. What can be looked at before a token is looked at for all of them at once: between
    two layers' weights every line of it is cold, and costs ten times as much.
    """

    def __init__(self, layers: Sequence[EdgeLayer]) -> None:
        """In any order."""
        self._layers = layers

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook in front of the model's ``forward``."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if ids is None:
            ids = next(iter(args), None)
        single = isinstance(ids, Tensor) and ids.shape == (1, 1)
        for layer in self._layers:
            layer.prepare(cache if single else None)

    def behind(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook behind it, called with nothing where it failed: then the token is in no layer's cache."""
        for layer in self._layers:
            layer.finish(output is not None)


def layers_in_one_call(model: PreTrainedModel, engine: Operator) -> int:
    """Let the usual decoder layers of ``model`` take single tokens through the operator; how many there are.

    After ``attend_in_one_call``, ``route_in_one_call`` and ``keep_cache_growing``.
    """
    found = [module for module in model.modules() if is_usual_layer(module)]
    taken = _Taken()
    for module in found:
        module.forward = EdgeLayer(module, engine, taken)  # type: ignore[method-assign]
    if found:
        layers = Layers([vars(module)["forward"] for module in found])
        model.register_forward_pre_hook(layers.before, with_kwargs=True)
        model.register_forward_hook(layers.behind, always_call=True)
    return len(found)


def is_usual_layer(module: nn.Module) -> bool:
    """Whether the code and the parts of ``module`` are those of the usual decoder layer and nothing else."""
    parts = dict(module.named_children())
    if set(parts) != set(_PARTS) or list(module.parameters(recurse=False)):
        return False
    norms = (parts["input_layernorm"], parts["post_attention_layernorm"])
    if not all(isinstance(one, EdgeNorm) for one in norms):
        return False
    if not isinstance(vars(parts["self_attn"]).get("forward"), EdgeAttention):
        return False
    return speaks_only_of(module, _PARTS)
