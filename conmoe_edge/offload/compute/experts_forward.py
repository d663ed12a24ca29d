"""The experts function of the runtime: what a consolidated layer computes (``format/slot_map.py`` has the formula).

``conmoe_experts_forward`` has the signature of every function in transformers' registry of experts functions, and works
for each architecture that uses that registry. It looks up the layer's handle and asks the backend that the runtime gave
it (``backend.py``): for one token its own way, else torch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conmoe_edge.errors import UsageError
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute.backend import ExpertBackend, LayerExperts

HANDLE = "_conmoe"
"""The attribute of an experts module that holds its ``LayerHandle``, or why it has none (``LeftAlone``)."""


@dataclass(slots=True)
class LayerHandle:
    """What hangs on the experts module of one layer.

    Attributes:
        slots: what its router slots stand for, on the device of the router's output.
        backend: what computes; ``None`` before the weights are there, and after the runtime was closed.
    """

    slots: SlotTensors
    backend: ExpertBackend | None = None
    _experts: LayerExperts | None = None

    def use(self, backend: ExpertBackend | None) -> None:
        """Compute with ``backend`` from now on."""
        self.backend, self._experts = backend, None
        if backend is not None:
            self.slots = self.slots.to(backend.device)

    def experts(self, module: nn.Module) -> LayerExperts | None:
        """The layer by its backend, made when it is first asked for; ``None`` without one. ``module`` is the experts
        module that this hangs on.
        """
        if self._experts is None and self.backend is not None:
            self._experts = self.backend.layer(self.slots, module)
        return self._experts


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """What hangs there instead on experts that transformers computes, in a model that was left unchanged, and why."""

    reason: str


@torch.no_grad()
def conmoe_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The routed experts' output: [..., H] like ``hidden_states``, from [..., K] router slots and gates.

    Raises:
        UsageError: the runtime is closed, or the model was moved to another device.
        PackageError: from reads.
    """
    handle: LayerHandle = getattr(self, HANDLE)
    experts = handle.experts(self)
    if experts is None or handle.backend is None:
        raise UsageError(
            "This model's prototypes are not loaded.",
            "its runtime was closed, or it was built without from_pretrained",
            "Load the package again: conmoe_edge.load(DIR)",
        )
    if hidden_states.device != handle.backend.device:
        raise UsageError(
            f"The model was moved to {hidden_states.device}.",
            f"its prototypes stay on {handle.backend.device}, where the package was loaded",
            "Load it there: conmoe_edge.load(DIR, device='cuda')",
        )
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
    slots = top_k_index.reshape(-1, top_k_index.shape[-1])  # [T, K]
    gates = top_k_weights.reshape(slots.shape)  # [T, K]
    out = experts.one_token(self, hidden, slots, gates) if len(hidden) == 1 else None
    if out is None:
        out = experts.tokens(self, hidden, slots, gates)
    return out.view(hidden_states.shape)
