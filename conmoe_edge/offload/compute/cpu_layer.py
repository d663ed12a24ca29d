"""A layer's experts, for one token in one call of the operator wherever all that it asks for is there.

Between two tokens a layer's weights push everything else out of the processor's caches, so every step
in Python and every small tensor operation costs many times what it costs in a loop: one call takes
the router's choice, adds up what meets on a prototype, looks up where the prototypes lie, computes,
and adds the constants. It does nothing where one of them has to be read first; then the caller takes
the way through the cache. What was computed with is told to the cache afterwards, and what the next
layer will probably ask for is read ahead then. In a layer whose prototypes all stay nobody has to
know.

Memory: a few addresses a slot. Raises nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute.torch_backend import gates_in_one_call
from conmoe_edge.offload.kernels.cpu.bindings import (
    BlockTable,
    Cached,
    LayerTable,
    Operator,
    Positions,
    RouterTable,
    operator,
)
from conmoe_edge.offload.residency.address_table import HostAddresses

if TYPE_CHECKING:
    from conmoe_edge.offload.residency.residency import Residency
    from conmoe_edge.offload.runtime import Runtime

_FORMATS = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class WholeLayer:
    """``table`` is ``None`` where the layer is not for this; it is right as long as ``residency`` is the runtime's.

    ``formats``: of the activations that it takes. ``stays``: whether all its prototypes are there for good.
    ``layer``: the decoder layer's number.
    """

    runtime: Runtime
    residency: Residency
    table: LayerTable | None = None
    engine: Operator | None = None
    formats: tuple[torch.dtype, ...] = ()
    stays: bool = False
    layer: int = 0

    @classmethod
    def of(cls, slots: SlotTensors, module: nn.Module, runtime: Runtime) -> WholeLayer:
        """The layer whose experts are ``module``."""
        residency, engine = runtime.residency, operator()
        numbers = slots.slot_map.prototypes
        addresses = runtime.addresses
        if engine is None or not isinstance(addresses, HostAddresses) or not numbers:
            return cls(runtime, residency)
        kinds = residency.kinds(numbers)
        formats = tuple(one for one in _FORMATS if gates_in_one_call(module, kinds, one))
        matrices = kinds[0].matrices
        if not formats or matrices is None:
            return cls(runtime, residency)
        forms = (matrices[0].form, matrices[1].form)
        table = LayerTable(addresses.table, forms, slots.slot_map, slots.constants)
        stays, layer = residency.stay(numbers), slots.slot_map.layer
        return cls(runtime, residency, table, engine, formats, stays, layer)

    def output(
        self, hidden: Tensor, slots: Tensor, gates: Tensor, residual: Tensor | None = None
    ) -> Tensor | None:
        """[1, H], [1, K], [1, K] -> [1, H], added to ``residual`` (H values) where there is one; ``None`` where this is
        not the way, or a prototype is not there.
        """
        if self.table is None or self.engine is None or hidden.dtype not in self.formats:
            return None
        if slots.dtype != torch.int64 or gates.dtype not in _FORMATS:
            return None
        self._notice()
        found = self.engine.layer(
            self.table, slots.contiguous(), gates.contiguous(), hidden.contiguous(), residual
        )
        return self._counted(found, hidden)

    def decoder(
        self,
        block: BlockTable,
        router: RouterTable,
        x: Tensor,
        positions: Positions,
        cached: Cached,
    ) -> Tensor | None:
        """The whole decoder layer around these experts; arguments and result as of ``Operator.decoder``."""
        assert self.table is not None and self.engine is not None
        self._notice()
        found = self.engine.decoder(block, router, self.table, x, positions, cached)
        return self._counted(found, router.between.normed)

    def _notice(self) -> None:
        if self.runtime.prefetcher is not None:
            self.residency.collect()

    def _counted(self, found: tuple[Tensor, int] | None, hidden: Tensor) -> Tensor | None:
        if found is None:
            return None
        out, count = found
        if self.stays:
            self.residency.used(count)
        else:
            assert self.table is not None
            self.residency.asked(self.table.asked(count))
        prefetcher = self.runtime.prefetcher
        if prefetcher is not None:
            self.residency.prefetch(prefetcher.next(self.layer, hidden))
        return out
