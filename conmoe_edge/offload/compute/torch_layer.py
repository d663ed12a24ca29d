"""A layer's experts by torch, for any number of tokens on any device.

Every prototype computes once, on all its tokens; contributions are added in fp32 in the order of the prototype numbers.
That order and the rule for the arithmetic do not depend on how many prototypes are resident, so neither does the
result.

Memory beside the runtime's own: the activations of one expert's tokens, or those of ``TOGETHER`` tokens in 8 bits
(``csrc/many_rows.h``), and an fp32 accumulator [T, H]; below
``MANY_ROWS`` tokens the outputs of all their prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conmoe_edge.model.experts import sum_dtype
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute.prototype_source import PrototypeSource
from conmoe_edge.offload.compute.torch_backend import MANY_ROWS, Arithmetic, Routed
from conmoe_edge.offload.storage.stored_expert import StoredExpert


class TorchLayer:
    """``LayerExperts`` by torch."""

    def __init__(
        self, residency: PrototypeSource, arithmetic: Arithmetic, slots: SlotTensors
    ) -> None:
        self.residency, self.arithmetic, self.slots = residency, arithmetic, slots
        self.number = slots.slot_map.layer

    def one_token(
        self, module: nn.Module, hidden: Tensor, slots: Tensor, gates: Tensor
    ) -> Tensor | None:
        """See ``LayerExperts``: there is no other way for one token."""
        return None

    def tokens(self, module: nn.Module, hidden: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
        routes = self.slots.routes(slots, gates)
        total = torch.zeros(hidden.shape, dtype=sum_dtype(hidden), device=hidden.device)

        def routed(position: int) -> Routed:
            span = slice(routes.starts[position], routes.starts[position + 1])
            return routes.rows[span], routes.weights[span]

        if len(hidden) >= MANY_ROWS:  # in the order of the numbers, each added as it comes

            def add(positions: Sequence[int], experts: Sequence[StoredExpert]) -> None:
                mine = [routed(position) for position in positions]
                self.arithmetic.add_all(module, experts, hidden, mine, total)

            after = self.residency.scanned_next(self.number, len(routes.prototypes))
            self.residency.visit(routes.prototypes, add, scan=True, ahead=after)
        else:
            found = [(routes.rows, hidden)] * len(routes.prototypes)
            # After the router's choices were read back, so that this does not wait for anything but itself.
            single = len(hidden) == 1
            ahead = self.residency.likely_next(self.number, hidden) if single else ()

            def keep(positions: Sequence[int], experts: Sequence[StoredExpert]) -> None:
                for position, expert in zip(positions, experts, strict=True):
                    rows, weights = routed(position)
                    out = self.arithmetic.rows(module, expert, hidden[rows])  # [n, H]
                    found[position] = rows, out * weights.unsqueeze(1)

            self.residency.visit(routes.prototypes, keep, ahead=ahead)
            for rows, out in found:
                total.index_add_(0, rows, out)
        self.slots.add_constants(total, slots, gates)
        return total.to(hidden.dtype)


class TorchBackend:
    """``ExpertBackend`` by torch."""

    def __init__(
        self, device: torch.device, residency: PrototypeSource, arithmetic: Arithmetic
    ) -> None:
        self.device, self.residency, self.arithmetic = device, residency, arithmetic
        self.name = arithmetic.name

    def layer(self, slots: SlotTensors, module: nn.Module) -> TorchLayer:
        return TorchLayer(self.residency, self.arithmetic, slots)

    def uncounted(self) -> tuple[int, int]:
        """See ``ExpertBackend``: the residency sees everything."""
        return 0, 0

    def reset_counts(self) -> None:
        """Nothing is counted here."""
