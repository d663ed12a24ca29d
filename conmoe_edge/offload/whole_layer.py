"""A layer whose prototypes are all pinned, for one token in one call of the operator.

Between two tokens a layer's weights push everything else out of the processor's caches, so every step
in Python and every small tensor operation costs many times what it costs in a loop: one call takes
the router's choice, adds up what meets on a prototype, computes, and adds the constants.

Memory: a few addresses a prototype. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from conmoe_edge.offload.arithmetic import gates_in_one_call
from conmoe_edge.offload.native import (
    BlockTable,
    Cached,
    LayerTable,
    Operator,
    Positions,
    RouterTable,
    operator,
)

if TYPE_CHECKING:
    from conmoe_edge.offload.residency import Residency
    from conmoe_edge.offload.runtime import Runtime

_FORMATS = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class WholeLayer:
    """``table`` is ``None`` where the layer is not for this; it is right as long as ``residency`` is the runtime's.

    ``formats``: of the activations that it takes.
    """

    residency: Residency
    table: LayerTable | None = None
    engine: Operator | None = None
    formats: tuple[torch.dtype, ...] = ()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        runtime: Runtime,
        targets: Sequence[int],
        factors: Sequence[float],
        constants: Sequence[Tensor | None],
    ) -> WholeLayer:
        """The layer with the prototype numbers ``targets``, factors and constants (empty for none) of its slots."""
        residency, engine = runtime.residency, operator()
        numbers = sorted({target for target in targets if target >= 0})
        reads_ahead = runtime.prefetcher is not None and not residency.all_resident
        experts = residency.pinned(numbers)
        if engine is None or runtime.device.type != "cpu" or reads_ahead or not experts:
            return cls(residency)
        formats = tuple(one for one in _FORMATS if gates_in_one_call(module, experts, one))
        if not formats:
            return cls(residency)
        position = {number: place for place, number in enumerate(numbers)}
        table = LayerTable(
            [one.prepared["gate_up_proj"] for one in experts],
            [one.prepared["down_proj"] for one in experts],
            [position.get(target, -1) for target in targets],
            factors or None,
            constants or None,
        )
        return cls(residency, table, engine, formats)

    def output(
        self, hidden: Tensor, slots: Tensor, gates: Tensor, residual: Tensor | None = None
    ) -> Tensor | None:
        """[1, H], [1, K], [1, K] -> [1, H], added to ``residual`` (H values) where there is one; ``None`` where this is
        not the way.
        """
        if self.table is None or self.engine is None or hidden.dtype not in self.formats:
            return None
        if slots.dtype != torch.int64 or gates.dtype not in _FORMATS:
            return None
        out, count = self.engine.layer(
            self.table, slots.contiguous(), gates.contiguous(), hidden.contiguous(), residual
        )
        self.residency.used(count)
        return out

    def decoder(
        self,
        block: BlockTable,
        router: RouterTable,
        x: Tensor,
        positions: Positions,
        cached: Cached,
    ) -> Tensor:
        """The whole decoder layer around these experts; arguments and result as of ``Operator.decoder``."""
        assert self.table is not None and self.engine is not None
        out, count = self.engine.decoder(block, router, self.table, x, positions, cached)
        self.residency.used(count)
        return out
