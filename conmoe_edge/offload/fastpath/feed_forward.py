"""What stands behind a layer's second norm, for the operator: router and experts, a dense layer, or both.

The one place in this folder that knows how ``offload/compute`` computes experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conmoe_edge.offload.compute.cpu_layer import CpuLayer
from conmoe_edge.offload.compute.experts_forward import HANDLE, LayerHandle, LeftAlone
from conmoe_edge.offload.fastpath.attention import unchanged
from conmoe_edge.offload.fastpath.dense_mlp import DenseMlp, dense_mlp
from conmoe_edge.offload.fastpath.fused_router import FusedRouter
from conmoe_edge.offload.fastpath.supported import Block, Mlp, Refusal, look_up
from conmoe_edge.offload.kernels.cpu.bindings import (
    BlockTable,
    Cached,
    FoundTogether,
    MlpTable,
    Operator,
    Positions,
    RouterTable,
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """For one token: the experts where there are any, and the dense layer where there is one."""

    whole: CpuLayer | None
    dense: MlpTable | None


class FeedForward:
    """The mlp of a decoder layer, and a shared expert that the layer has beside it."""

    def __init__(self, module: nn.Module, spec: Block | None, dense: DenseMlp | None) -> None:
        """For what ``feed_forward`` takes; without ``spec`` the dense layer is all there is.

        ``dense``: whether there is a dense layer.
        """
        self.dense = dense is not None
        self._module, self._spec, self._dense = module, spec, dense
        self._parts = dict(module.named_children())
        self.gate = None if spec is None else self._parts[spec.router]
        self._experts = None if spec is None else self._parts[spec.experts]
        self._front = None if self._experts is None else vars(self._experts).get("forward")

    def why_not(self) -> str:
        """Why the operator does not take all of it now; empty where it does."""
        if self.prepare() is None:
            return "the operator does not take its experts"
        return "its router is not the operator's" if self.gate and self.router() is None else ""

    def prepare(self) -> Prepared | None:
        """For the next token; ``None`` where a part was exchanged or has hooks, or the operator does not take it."""
        whole = None
        if self._spec is not None:
            whole = self._whole(self._spec)
            if whole is None:
                return None
        dense = None if self._dense is None else self._dense.current()
        return None if self._dense is not None and dense is None else Prepared(whole, dense)

    def still_has(self, ready: Prepared) -> bool:
        """Whether ``prepare`` would give ``ready`` again, where no part was exchanged and none has hooks."""
        if self._experts is None:
            return True
        handle: LayerHandle = getattr(self._experts, HANDLE)
        return handle.backend is not None and handle.experts(self._experts) is ready.whole

    def router(self) -> RouterTable | None:
        """The router, where it is the operator's and has no hooks; a forward may begin with setting some."""
        gate = self.gate
        if gate is None:
            return None
        fused = gate.__dict__.get("forward")
        if type(fused) is not FusedRouter or gate._forward_hooks or gate._forward_pre_hooks:
            return None
        return fused.current(self._correction())

    def route(self, hidden: Tensor) -> Any:
        """What the router's module gives for [1, H]."""
        correction = self._correction()
        assert self.gate is not None, "a feed forward with experts has a router"
        if self._spec is not None and self._spec.whole:
            hidden = hidden.view(1, 1, -1)
        return self.gate(hidden) if correction is None else self.gate(hidden, correction)

    def decoder(
        self,
        ready: Prepared,
        table: BlockTable,
        router: RouterTable | None,
        x: Tensor,
        positions: Positions | None,
        cached: Cached,
        engine: Operator,
    ) -> Tensor | None:
        """``Operator.decoder`` around this; ``None`` where a prototype has to be read first."""
        whole = ready.whole
        if whole is None or router is None:
            found = engine.decoder(table, None, None, x, positions, cached, ready.dense)
            return None if found is None else found[0]
        return whole.decoder(table, router, x, positions, cached, ready.dense)

    def decoder_together(
        self,
        ready: Prepared,
        table: BlockTable,
        router: RouterTable | None,
        x: Tensor,
        where: Sequence[tuple[Positions | None, Cached]],
        engine: Operator,
    ) -> FoundTogether:
        """``decoder`` for one token each of several answers, as ``Operator.decoder_together``."""
        if ready.whole is None or router is None:
            return engine.decoder_together(table, None, None, x, where, ready.dense)
        return ready.whole.decoder_together(table, router, x, where, ready.dense)

    def output_together(self, ready: Prepared, found: FoundTogether, engine: Operator) -> Tensor:
        """``output`` for what ``decoder_together`` found, missing prototypes being read once: [T, H]."""
        assert ready.whole is not None and self._experts is not None
        hidden = found.normed
        out = ready.whole.together_with_misses(self._experts, hidden, found.slots, found.gates)
        return out if ready.dense is None else out + engine.dense_together(ready.dense, hidden)

    def output(
        self, ready: Prepared, hidden: Tensor, slots: Tensor, gates: Tensor, engine: Operator
    ) -> Tensor:
        """[1, H], [1, K], [1, K] -> [1, H]: experts, missing prototypes being read, and the dense layer."""
        assert ready.whole is not None
        out = ready.whole.output(hidden, slots, gates)
        if out is None:
            return self.output_with_misses(ready, hidden, slots, gates, engine)
        return out if ready.dense is None else out + engine.dense(ready.dense, hidden)

    def output_with_misses(
        self, ready: Prepared, hidden: Tensor, slots: Tensor, gates: Tensor, engine: Operator
    ) -> Tensor:
        """``output`` where it is known that a prototype has to be read."""
        assert ready.whole is not None and self._experts is not None
        out = ready.whole.forward_with_misses(self._experts, hidden, slots, gates)
        return out if ready.dense is None else out + engine.dense(ready.dense, hidden)

    def _correction(self) -> Tensor | None:
        name = "" if self._spec is None else self._spec.correction
        return getattr(self._module, name, None) if name else None

    def _whole(self, spec: Block) -> CpuLayer | None:
        """The experts, where the operator takes them."""
        experts = self._parts[spec.experts]
        handle: LayerHandle = getattr(experts, HANDLE)
        if handle.backend is None or vars(experts).get("forward") is not self._front:
            return None
        if not unchanged(self._module, self._parts, called=(spec.router,)):
            return None
        found = handle.experts(experts)
        if not isinstance(found, CpuLayer) or found.table is None:
            return None
        return found if torch.bfloat16 in found.formats else None


def feed_forward(
    module: nn.Module, beside: nn.Module | None, engine: Operator
) -> FeedForward | Refusal:
    """``module``, the mlp of a layer, and ``beside`` it a shared expert of the layer."""
    if not isinstance(look_up(module, Mlp), Refusal) and beside is None:
        dense = dense_mlp(module, engine)
        return dense if isinstance(dense, Refusal) else FeedForward(module, None, dense)
    spec = look_up(module, Block)
    if isinstance(spec, Refusal):
        found = look_up(module, Mlp)  # says why
        return found if isinstance(found, Refusal) and found.reason else spec
    parts, name = dict(module.named_children()), type(module).__name__
    shared = parts.get(spec.shared) if spec.shared else beside
    wanted = {spec.router, spec.experts, *([spec.shared] if spec.shared in parts else [])}
    if set(parts) != wanted | ({spec.share} - {""}):
        return Refusal(f"{name} has other parts than its class")
    handle = getattr(parts[spec.experts], HANDLE, None)
    if isinstance(handle, LeftAlone):
        return Refusal(f"its experts are transformers': {handle.reason}")
    if not isinstance(handle, LayerHandle):
        return Refusal("its experts are not those of a package")
    if shared is None:
        return FeedForward(module, spec, None)
    dense = dense_mlp(shared, engine, parts[spec.share] if spec.share else None)
    return dense if isinstance(dense, Refusal) else FeedForward(module, spec, dense)
