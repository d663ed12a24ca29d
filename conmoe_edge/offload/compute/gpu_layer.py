"""A layer's experts for one token by the Triton kernels of a GPU, in four launches. Experimental: see
``kernels/triton/launch.py``.

Where all prototypes of a layer stay, the host learns nothing of what the router has chosen: it issues the launches and
goes on. Elsewhere it reads the numbers back, brings what is missing, and has what is there computed meanwhile; where
the user wants that (``miss_split.py``), the processor computes some of what is missing at the same time. Outputs are
added in the order of the numbers each time, so with copies the bits are the same.

Memory: some numbers a router slot. Raises ``PackageError`` from reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute.cpu_fallback import HostCompute
from conmoe_edge.offload.compute.torch_backend import Arithmetic, usual_gate
from conmoe_edge.offload.compute.torch_layer import TorchBackend, TorchLayer
from conmoe_edge.offload.kernels.triton.launch import MOST_SLOTS, GpuLayer, GpuOperator, GpuTable
from conmoe_edge.offload.residency.residency import Residency
from conmoe_edge.offload.storage.place import Place
from conmoe_edge.offload.storage.stored_expert import StoredExpert

_ACTIVATIONS = (torch.bfloat16, torch.float16)


class GpuAddresses:
    """A view of the address table for the kernels, which read addresses from ``table``."""

    def __init__(self, residency: Residency, device: torch.device) -> None:
        layouts = [pool.layout for pool in residency.pools]
        self.table = GpuTable(layouts, residency.layout_of, device)
        self._pools = residency.pools  # not the residency, which would never be dropped
        residency.table.watch(self)

    def put(self, number: int, place: Place) -> None:
        """See ``AddressView``; it holds for launches that are issued from now on."""
        self.table.put(number, self._pools[place[0]].record(place[1]).data_ptr())

    def remove(self, number: int) -> None:
        """See ``AddressView``. No kernel is launched for a prototype that is not present."""


class TritonLayer(TorchLayer):
    """``LayerExperts`` by the kernels; ``stays``: whether all its prototypes are there for good."""

    def __init__(self, backend: TritonBackend, slots: SlotTensors, layer: GpuLayer | None) -> None:
        """``layer`` is ``None`` where the kernels do not take it."""
        super().__init__(backend.residency, backend.arithmetic, slots)
        self._backend, self._layer = backend, layer
        self.stays = self.residency.table.stay(slots.slot_map.prototypes)

    def one_token(
        self, module: nn.Module, hidden: Tensor, slots: Tensor, gates: Tensor
    ) -> Tensor | None:
        layer, engine = self._layer, self._backend.engine
        if layer is None or hidden.dtype not in _ACTIVATIONS:
            return None
        if slots.dtype != torch.int64 or slots.numel() > MOST_SLOTS:
            return None
        x, slots, gates = hidden.contiguous(), slots.contiguous(), gates.contiguous()
        chosen = engine.merge(layer, slots, gates, counted=self.stays)
        if self.stays:
            engine.experts(layer, chosen, (1 << slots.numel()) - 1, x)
            return engine.combine(layer, chosen, slots, gates, hidden.dtype)
        numbers = [number for number in chosen.numbers.tolist() if number >= 0]
        # After the router's choices were read back, so that this does not wait for anything but itself.
        ahead = self.residency.likely_next(self.number, hidden)
        host = self._backend.host
        aside = [] if host is None else self._aside(host, module, numbers, hidden)
        rest = [position for position in range(len(numbers)) if position not in aside]
        given = hidden.cpu() if aside else hidden

        def by_processor() -> None:
            """While what has been issued is under way."""
            if aside and host is not None:
                outputs = host.outputs(module, [numbers[one] for one in aside], given)
                chosen.outputs[list(aside)] = outputs.to(hidden.device)
                aside.clear()

        def compute(positions: Sequence[int], experts: Sequence[StoredExpert]) -> None:
            wanted = sum(1 << rest[position] for position in positions)
            engine.experts(layer, chosen, wanted, x)
            by_processor()

        if rest:
            self.residency.visit([numbers[position] for position in rest], compute, ahead=ahead)
        by_processor()
        return engine.combine(layer, chosen, slots, gates, hidden.dtype)

    def _aside(
        self, host: HostCompute, module: nn.Module, numbers: Sequence[int], hidden: Tensor
    ) -> list[int]:
        """The positions of what the processor is to compute."""
        missing = [number for number in numbers if self.residency.table.place(number) is None]
        named = set(host.choose(module, missing, hidden))
        return [position for position, number in enumerate(numbers) if number in named]


class TritonBackend(TorchBackend):
    """``ExpertBackend`` by the kernels.

    ``host``: computes what is not on the GPU where it lies; ``None`` to copy everything.
    """

    def __init__(
        self,
        device: torch.device,
        residency: Residency,
        arithmetic: Arithmetic,
        engine: GpuOperator,
        host: HostCompute | None,
    ) -> None:
        super().__init__(device, residency, arithmetic)
        self.name, self.engine, self.host = engine.name, engine, host
        self._table = GpuAddresses(residency, device).table

    def layer(self, slots: SlotTensors, module: nn.Module) -> TritonLayer:
        found = GpuLayer.of(self._table, slots) if usual_gate(module) else None
        if found is not None and module.is_transposed and not found.quantised:
            found = None
        return TritonLayer(self, slots, found)

    def uncounted(self) -> tuple[int, int]:
        """See ``ExpertBackend``: the device counts in layers whose prototypes stay."""
        return int(self._table.asked), 0 if self.host is None else self.host.computed

    def reset_counts(self) -> None:
        self._table.asked.zero_()
        if self.host is not None:
            self.host.computed = 0
