"""What computes the experts of a layer, and which of the three backends a device gets.

======================  ===============================================================================================
``TorchBackend``        any device, any number of tokens (``torch_layer.py``)
``CpuBackend``          a CPU: one token by the compiled operator, else as above (``cpu_layer.py``)
``TritonBackend``       a GPU with Triton: one token by its kernels, else as the first (``gpu_layer.py``; experimental)
======================  ===============================================================================================

The runtime makes one backend for each ``Residency`` and gives it to every ``LayerHandle``; after a retreat it makes
another one. A backend knows the residency that it was given, and nothing of the runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute.cpu_fallback import HostCompute
from conmoe_edge.offload.compute.cpu_layer import CpuBackend
from conmoe_edge.offload.compute.gpu_layer import TritonBackend
from conmoe_edge.offload.compute.torch_backend import Arithmetic
from conmoe_edge.offload.compute.torch_layer import TorchBackend
from conmoe_edge.offload.kernels.triton.launch import gpu_operator
from conmoe_edge.offload.residency.residency import Residency
from conmoe_edge.offload.storage.pinned_tier import HostTier


class LayerExperts(Protocol):
    """The routed experts of one layer, for as long as its backend's residency is in use.

    ``module`` is the experts module, whose attributes are read; router slots are int64 [T, K], gates [T, K], hidden
    states and results [T, H] in one format. Reads may raise ``PackageError``.
    """

    def one_token(
        self, module: nn.Module, hidden: Tensor, slots: Tensor, gates: Tensor
    ) -> Tensor | None:
        """T = 1, by the backend's own way; ``None`` where it does not take the layer or the token."""
        ...

    def tokens(self, module: nn.Module, hidden: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
        """Any T, by torch."""
        ...


class ExpertBackend(Protocol):
    """What the experts of all layers are computed with.

    Attributes:
        name: what computes a few rows, for reports.
        device: where hidden states are.
        arithmetic: what computes single experts.
    """

    name: str
    device: torch.device
    arithmetic: Arithmetic

    def layer(self, slots: SlotTensors, module: nn.Module) -> LayerExperts:
        """A layer by its map, which is on the device, and its experts module."""
        ...

    def uncounted(self) -> tuple[int, int]:
        """Prototypes that the residency was not asked for: (hits, computed by the processor instead of copied)."""
        ...

    def reset_counts(self) -> None:
        """Count those from zero."""
        ...


def backend_maker(
    device: torch.device, host: HostTier | None, manifest: Manifest
) -> Callable[[Residency], ExpertBackend]:
    """What makes the backends for ``device``.

    Args:
        device: where the compute happens.
        host: records that the processor may compute where they lie, instead of having them copied to a GPU.
        manifest: of the package.
    """
    arithmetic = Arithmetic(device)
    aside = HostCompute(host, manifest) if host is not None and host.nbytes else None
    engine = gpu_operator(device)
    if engine is not None:
        return lambda residency: TritonBackend(device, residency, arithmetic, engine, aside)
    kind = CpuBackend if device.type == "cpu" else TorchBackend
    return lambda residency: kind(device, residency, arithmetic)
