"""The experts function of the runtime: what a consolidated layer computes.

For a token t with the router's slots i and gates g_i,

    y(t) = sum over prototypes p of alpha_p(t) * p(x_t)  +  sum over i of g_i(t) * c_i,
    alpha_p(t) = sum over slots i with m(i) = p of g_i(t) * s_i,

where m is the reassignment map, s_i the slot's scale and c_i its constant (both rare). A slot
without prototype adds its constant or nothing; an index outside the router's slots adds nothing.

``conmoe_experts_forward`` has the signature of every function in transformers' registry of experts
functions, and works for each architecture that uses that registry. Every prototype computes once,
on all its tokens; contributions are added in fp32 in the order of the prototype numbers. That order
and the rule for the number format do not depend on how many prototypes are resident, so neither
does the result.

Memory beside the runtime's own: the activations of one expert's tokens and an fp32 accumulator [T,
H].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from conmoe_edge.errors import UsageError
from conmoe_edge.model.experts import add_constants, expert_forward, merge_routes, sum_dtype
from conmoe_edge.offload.arithmetic import compute_dtype

if TYPE_CHECKING:
    from conmoe_edge.offload.runtime import Runtime

HANDLE = "_conmoe"
"""The attribute of an experts module that holds its ``LayerHandle``."""


@dataclass(slots=True)
class LayerHandle:
    """What one layer's router slots stand for.

    Attributes:
        layer: the decoder layer.
        slot_map: [E] int64, prototype numbers, -1 where a slot has none.
        scales: [E] fp32, or ``None`` where every scale is 1.
        constants: [C, H] fp32, or ``None``; row ``constant_of[i]`` belongs to slot i.
        constant_of: [E] int64, -1 where a slot has none.
        runtime: set once the weights are there.
    """

    layer: int
    slot_map: Tensor
    scales: Tensor | None = None
    constants: Tensor | None = None
    constant_of: Tensor | None = None
    runtime: Runtime | None = None

    def to(self, device: torch.device) -> None:
        """Move the tables to where the router's output is."""
        self.slot_map = self.slot_map.to(device)
        if self.scales is not None:
            self.scales = self.scales.to(device)
        if self.constants is not None and self.constant_of is not None:
            self.constants = self.constants.to(device)
            self.constant_of = self.constant_of.to(device)


@torch.no_grad()
def conmoe_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The routed experts' output: [..., H] like ``hidden_states``, from [..., K] slots and
    gates.
    """
    handle: LayerHandle = getattr(self, HANDLE)
    runtime = handle.runtime
    if runtime is None or runtime.closed:
        raise UsageError(
            "This model's prototypes are not loaded.",
            "its runtime was closed, or it was built without from_pretrained",
            "Load the package again: conmoe_edge.load(DIR)",
        )
    if hidden_states.device != runtime.device:
        raise UsageError(
            f"The model was moved to {hidden_states.device}.",
            f"its prototypes stay on {runtime.device}, where the package was loaded",
            "Load it there: conmoe_edge.load(DIR, device='cuda')",
        )
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
    index = top_k_index.reshape(-1, top_k_index.shape[-1])  # [T, K]
    weights = top_k_weights.reshape(index.shape)  # [T, K]
    routes = merge_routes(index, weights, handle.slot_map, handle.scales)
    total = torch.zeros(hidden.shape, dtype=sum_dtype(hidden), device=hidden.device)  # [T, H]

    def add(position: int, parts: Mapping[str, Tensor]) -> None:
        start, stop = routes.starts[position], routes.starts[position + 1]
        rows = routes.rows[start:stop]
        weight = next(iter(parts.values())).dtype
        dtype = compute_dtype(runtime.machine, hidden.dtype, weight, stop - start)
        out = expert_forward(
            self, hidden[rows], runtime.scratch.convert(parts, dtype), dtype
        )  # [n, H]
        out = out.to(total.dtype) * routes.weights[start:stop].unsqueeze(1)
        total.index_add_(0, rows, out)  # a prototype sees a token once, so no two rows collide

    runtime.residency.visit(routes.prototypes, add)
    if handle.constants is not None and handle.constant_of is not None:
        add_constants(total, index, weights, handle.constants, handle.constant_of)
    return total.to(hidden_states.dtype).view(hidden_states.shape)
