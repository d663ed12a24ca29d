"""A block of router and routed experts as a decoder layer's call needs it.

The one place in this folder that knows how ``offload/compute`` computes experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conmoe_edge.offload.compute.cpu_layer import CpuLayer
from conmoe_edge.offload.compute.experts_forward import HANDLE, LayerHandle
from conmoe_edge.offload.fastpath.attention import unchanged
from conmoe_edge.offload.fastpath.router import FusedRouter
from conmoe_edge.offload.fastpath.supported import Block, Refusal, look_up
from conmoe_edge.offload.kernels.cpu.bindings import RouterTable


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """A block that is its router and the experts of a package, and nothing else."""

    block: nn.Module
    spec: Block
    parts: dict[str, nn.Module]

    @classmethod
    def of(cls, block: nn.Module) -> LayerExperts | Refusal:
        """``block`` of a listed class, in a loaded package."""
        spec = look_up(block, Block)
        if isinstance(spec, Refusal):
            return spec
        parts, name = dict(block.named_children()), type(block).__name__
        if set(parts) != {spec.router, spec.experts}:
            return Refusal(f"{name} has other parts than its class")
        if not isinstance(getattr(parts[spec.experts], HANDLE, None), LayerHandle):
            return Refusal("its experts are not those of a package")
        return cls(block, spec, parts)

    @property
    def gate(self) -> nn.Module:
        """The router's module."""
        return self.parts[self.spec.router]

    def router(self) -> RouterTable | None:
        """The router, where it is the operator's and has no hooks; a forward may begin with setting some."""
        gate = self.gate
        fused = gate.__dict__.get("forward")
        if type(fused) is not FusedRouter or gate._forward_hooks or gate._forward_pre_hooks:
            return None
        return fused.current()

    def whole(self) -> CpuLayer | None:
        """Its experts, where the operator takes them."""
        experts = self.parts[self.spec.experts]
        handle: LayerHandle = getattr(experts, HANDLE)
        if handle.backend is None:
            return None
        if not unchanged(self.block, self.parts, called=(self.spec.router,)):
            return None
        found = handle.experts(experts)
        if not isinstance(found, CpuLayer) or found.table is None:
            return None
        return found if torch.bfloat16 in found.formats else None

    def forward_with_misses(
        self, whole: CpuLayer, hidden: Tensor, slots: Tensor, gates: Tensor
    ) -> Tensor:
        """[1, H], [1, K], [1, K] -> [1, H], missing prototypes being read."""
        return whole.forward_with_misses(self.parts[self.spec.experts], hidden, slots, gates)
