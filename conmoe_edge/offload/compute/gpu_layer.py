"""A layer's experts for one token by the operator of a GPU (``gpu``), in four launches.

Where all prototypes of a layer stay, the host learns nothing of what the router has chosen: it issues the launches and
goes on. Elsewhere it reads the numbers back, brings what is missing, and has what is there computed meanwhile; where
the user wants that (``miss_split.py``), the processor computes some of what is missing at the same time. Outputs are
added in the order of the numbers each time, so with copies the bits are the same.

Memory: some numbers a router slot. Raises ``PackageError`` from reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute.torch_backend import usual_gate
from conmoe_edge.offload.kernels.triton.launch import MOST_SLOTS, GpuLayer, GpuOperator, GpuTable
from conmoe_edge.offload.storage.stored_expert import StoredExpert

if TYPE_CHECKING:
    from conmoe_edge.offload.compute.cpu_fallback import HostCompute
    from conmoe_edge.offload.residency.residency import Residency
    from conmoe_edge.offload.runtime import Runtime

_ACTIVATIONS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class LayerOnGpu:
    """``layer`` is ``None`` where the operator does not take it; it is right as long as ``residency`` is the runtime's.

    ``stays``: whether all its prototypes are there for good.
    """

    runtime: Runtime
    residency: Residency
    number: int
    layer: GpuLayer | None = None
    engine: GpuOperator | None = None
    stays: bool = False

    @classmethod
    def of(cls, slots: SlotTensors, module: nn.Module, runtime: Runtime) -> LayerOnGpu:
        """The layer whose experts are ``module``; its map is on the device."""
        residency, table = runtime.residency, runtime.addresses
        layer = None
        if runtime.gpu is not None and isinstance(table, GpuTable) and usual_gate(module):
            layer = GpuLayer.of(table, slots)
        number = slots.slot_map.layer
        if layer is None or (module.is_transposed and not layer.quantised):
            return cls(runtime, residency, number)
        stays = residency.stay(slots.slot_map.prototypes)
        return cls(runtime, residency, number, layer, runtime.gpu, stays)

    def output(
        self, module: nn.Module, hidden: Tensor, slots: Tensor, gates: Tensor
    ) -> Tensor | None:
        """[1, H], [1, K], [1, K] -> [1, H] in the format of ``hidden``; ``None`` where this is not the way."""
        layer, engine = self.layer, self.engine
        if layer is None or engine is None or hidden.dtype not in _ACTIVATIONS:
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
        prefetcher = self.runtime.prefetcher
        ahead = () if prefetcher is None else prefetcher.next(self.number, hidden)
        aside = self._aside(module, numbers, hidden)
        rest = [position for position in range(len(numbers)) if position not in aside]
        given = hidden.cpu() if aside else hidden

        def by_processor() -> None:
            """While what has been issued is under way."""
            if aside:
                outputs = self._host.outputs(module, [numbers[one] for one in aside], given)
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

    @property
    def _host(self) -> HostCompute:
        host = self.runtime.host_compute
        assert host is not None, "only with it is anything computed aside"
        return host

    def _aside(self, module: nn.Module, numbers: Sequence[int], hidden: Tensor) -> list[int]:
        """The positions of what the processor is to compute."""
        if self.runtime.host_compute is None:
            return []
        missing = [number for number in numbers if not self.residency.placed(number)]
        named = set(self._host.choose(module, missing, hidden))
        return [position for position, number in enumerate(numbers) if number in named]
