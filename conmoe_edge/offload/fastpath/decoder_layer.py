"""A decoder layer for one new token, in one call of the operator wherever all its prototypes are there.

That is norm, attention, sum, norm, router (``router.py``), experts (``layer_experts.py``), sum. Where the router has
chosen a prototype that is not there, the call ends before the experts, and they go through the cache. Where the router
is another one, or has hooks, it is called as the model has it, between two calls of the operator; and so is what else
may stand behind the second norm: a dense layer, shared experts, experts that the operator does not take. Every step in
Python and every small tensor operation that is saved is a cold one (``attention.py``).

As there, a layer has computed a token both ways, to the same bits, before the operator answers.

Memory: as ``attention.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conmoe_edge.compat import cache_of
from conmoe_edge.offload.compute.cpu_layer import CpuLayer
from conmoe_edge.offload.fastpath.attention import FusedAttention, Place, agree, unchanged
from conmoe_edge.offload.fastpath.layer_experts import LayerExperts
from conmoe_edge.offload.fastpath.report import Served
from conmoe_edge.offload.fastpath.rms_norm import FusedNorm
from conmoe_edge.offload.fastpath.supported import Layer, Refusal, look_up
from conmoe_edge.offload.kernels.cpu.bindings import (
    AttentionTable,
    BlockTable,
    Cached,
    Operator,
    Positions,
)


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a layer needs for the next token, but for its activations."""

    cache: Any
    place: Place
    table: BlockTable
    whole: CpuLayer | None


class Checked:
    """Arguments of a layer that were looked at, and taken: a model gives all its layers the same."""

    def __init__(self) -> None:
        self._embeddings: Any = None
        self._count = 0
        self.positions: Positions | None = None

    def same(self, arguments: Mapping[str, Any]) -> bool:
        """Whether ``arguments`` are those that were looked at last."""
        embeddings = arguments.get("position_embeddings")
        return (
            embeddings is not None
            and embeddings is self._embeddings
            and len(arguments) == self._count
            and arguments.get("attention_mask") is None
        )

    def keep(self, arguments: Mapping[str, Any]) -> None:
        """``arguments`` were taken."""
        self._embeddings, self._count = arguments["position_embeddings"], len(arguments)
        self.positions = Positions(*self._embeddings)


class FusedLayer:
    """Stands in front of the ``forward`` of a decoder layer of a loaded model, for inference only.

    ``verified``: whether the operator computed the same as transformers; ``None`` before there was a token to try.
    ``experts``: of its block, or why the block is called as the model has it.
    """

    def __init__(
        self, module: nn.Module, spec: Layer, engine: Operator, checked: Checked, served: Served
    ) -> None:
        """For a module that ``fused_layer`` takes."""
        self.verified: bool | None = None
        self._tried_whole = self._one_call = False
        self._own = weakref.WeakMethod(module.forward)
        self._engine, self._checked, self._served = engine, checked, served
        self._parts = parts = dict(module.named_children())
        self._before: FusedNorm = parts[spec.before]  # pyright: ignore[reportAttributeAccessIssue]
        self._after: FusedNorm = parts[spec.after]  # pyright: ignore[reportAttributeAccessIssue]
        self._attending = parts[spec.attention]
        self._attention: FusedAttention = vars(self._attending)["forward"]
        self._mlp = parts[spec.mlp]
        self.experts = LayerExperts.of(self._mlp)
        self._table: tuple[AttentionTable, BlockTable] | None = None
        self._ready: _Ready | None = None
        self._written: _Ready | None = None

    def why_not_one_call(self) -> str:
        """Why the experts are not part of the call; empty where they are."""
        if isinstance(self.experts, Refusal):
            return self.experts.reason
        if self.experts.whole() is None:
            return "the operator does not take its experts"
        return "" if self.experts.router() else "its router is not the operator's"

    def prepare(self, cache: Any) -> None:
        """For a token that comes next, behind those in ``cache``; with ``None`` for anything else."""
        self._ready = self._written = None
        own = self._own()
        if cache is None or own is None or False in (self.verified, self._attention.verified):
            return
        before, after = self._before.current(), self._after.current()
        place = self._attention.place(cache)
        if before is None or after is None or place is None:
            return
        if not unchanged(own.__self__, self._parts):
            return
        if self._table is None or self._table[0] is not place.table:
            try:
                self._table = (place.table, BlockTable(place.table, before, after))
            except ValueError:
                self.verified = False
                return
        whole = None if isinstance(self.experts, Refusal) else self.experts.whole()
        if self._tried_whole != (whole is not None):
            self._tried_whole, self.verified = whole is not None, None
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
        if ready is None or len(args) != 1 or cache_of(kwargs) is not ready.cache:
            return own(*args, **kwargs)
        x: Tensor = args[0]
        if not self._checked.same(kwargs):
            if not self._attention.takes(x, kwargs):
                return own(*args, **kwargs)
            self._checked.keep(kwargs)
        if x.dtype != torch.bfloat16 or x.numel() != ready.place.table.hidden:
            return own(*args, **kwargs)
        if self._attending.__dict__.get("forward") is not self._attention:
            return own(*args, **kwargs)  # its forward was replaced after loading
        positions = self._checked.positions
        assert positions is not None
        if self.verified is None:
            return self._try(lambda: own(*args, **kwargs), x, positions, ready)
        out = self._compute(x.contiguous(), positions, ready, ready.place.cached)
        self._written = ready
        if self._one_call:
            self._served.layers += 1
        else:
            self._served.blocks += 1
        return out

    def _try(self, own: Callable[[], Any], x: Tensor, positions: Positions, ready: _Ready) -> Any:
        """The token by transformers, and beside it by the operator with what the router said (or with what stands in
        the experts' place gave), to see whether they are the same.
        """
        routed: list[Any] = []
        experts = self.experts
        known = self._mlp if isinstance(experts, Refusal) or not ready.whole else experts.gate
        hook = known.register_forward_hook(lambda *call: routed.append(call[2]))
        try:
            wanted = own()
        finally:
            hook.remove()

        def compute(cached: Cached) -> bool:
            found = self._compute(x.contiguous(), positions, ready, cached, routed[0])
            return torch.equal(found, wanted)

        usual = isinstance(wanted, Tensor) and len(routed) == 1
        self.verified = usual and agree(ready.place, compute)
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
        experts, whole = self.experts, ready.whole
        self._one_call = False
        if isinstance(experts, Refusal) or whole is None:
            summed, normed = self._engine.block(ready.table, x, positions, cached)
            return summed + (self._mlp(normed) if known is None else known)
        router = experts.router()
        if router is not None:
            self._one_call = True
            out = whole.decoder(ready.table, router, x, positions, cached)
            if out is not None:
                return out
            found = router.between
            given = experts.forward_with_misses(whole, found.normed, found.slots, found.gates)
            return (found.summed + given).view(x.shape)
        summed, normed = self._engine.block(ready.table, x, positions, cached)
        flat = normed.view(1, -1)
        routed = experts.gate(flat) if known is None else known
        out = whole.output(flat, routed[2], routed[1], summed)
        if out is None:
            out = summed + experts.forward_with_misses(whole, flat, routed[2], routed[1])
        return out.view(x.shape)


def fused_layer(
    module: nn.Module, engine: Operator, checked: Checked, served: Served
) -> FusedLayer | Refusal:
    """What stands in front of ``module``'s ``forward``, whose norms and attention are the operator's already."""
    spec = look_up(module, Layer)
    if isinstance(spec, Refusal):
        return spec
    name, parts = type(module).__name__, dict(module.named_children())
    if set(parts) != set(spec.parts):
        return Refusal(f"{name} has other parts than its class")
    if not all(isinstance(parts[one], FusedNorm) for one in (spec.before, spec.after)):
        return Refusal(f"a norm of {name} is not the operator's")
    if not isinstance(vars(parts[spec.attention]).get("forward"), FusedAttention):
        return Refusal("")  # its attention has said why
    return FusedLayer(module, spec, engine, checked, served)
