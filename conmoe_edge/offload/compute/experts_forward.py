"""The experts function of the runtime: what a consolidated layer computes.

For a token t with the router's slots i and gates g_i,

    y(t) = sum over prototypes p of alpha_p(t) * p(x_t)  +  sum over i of g_i(t) * c_i,
    alpha_p(t) = sum over slots i with m(i) = p of g_i(t) * s_i,

where m is the reassignment map, s_i the slot's scale and c_i its constant (both rare). A slot
without prototype adds its constant or nothing; an index outside the router's slots adds nothing.

``conmoe_experts_forward`` has the signature of every function in transformers' registry of experts
functions, and works for each architecture that uses that registry. Every prototype computes once,
on all its tokens; contributions are added in fp32 in the order of the prototype numbers. That order
and the rule for the arithmetic do not depend on how many prototypes are resident, so neither does
the result.

One token on a GPU goes through its operator where that takes the layer (``gpu_layer.py``). One token on a CPU takes a
way of its own: where all prototypes that it asks for are there, one call
of the operator does everything (``LayerHandle.whole``); elsewhere a handful of numbers is quicker to
merge in Python than by tensor operations, and all prototypes that are there compute in one call
while the others are being read. The bits are the same.

Memory beside the runtime's own: the activations of one expert's tokens and an fp32 accumulator [T,
H]; below ``MANY_ROWS`` tokens the outputs of all their prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from conmoe_edge.errors import UsageError
from conmoe_edge.model.experts import sum_dtype
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute.cpu_layer import WholeLayer
from conmoe_edge.offload.compute.gpu_layer import LayerOnGpu
from conmoe_edge.offload.compute.torch_backend import MANY_ROWS
from conmoe_edge.offload.storage.stored_expert import StoredExpert

if TYPE_CHECKING:
    from conmoe_edge.offload.runtime import Runtime

HANDLE = "_conmoe"
"""The attribute of an experts module that holds its ``LayerHandle``."""


@dataclass(slots=True)
class LayerHandle:
    """What hangs on the experts module of one layer.

    Attributes:
        slots: what its router slots stand for, on the device of the router's output.
        runtime: set once the weights are there.
    """

    slots: SlotTensors
    runtime: Runtime | None = None
    _whole: WholeLayer | None = None
    _on_gpu: LayerOnGpu | None = None

    @property
    def layer(self) -> int:
        """The decoder layer."""
        return self.slots.slot_map.layer

    def whole(self, module: nn.Module, runtime: Runtime) -> WholeLayer:
        """The layer for one call, as far as it can be had with what is resident now."""
        if self._whole is None or self._whole.residency is not runtime.residency:
            self._whole = WholeLayer.of(self.slots, module, runtime)
        return self._whole

    def on_gpu(self, module: nn.Module, runtime: Runtime) -> LayerOnGpu:
        """The layer for the operator of a GPU, as far as it takes it."""
        if self._on_gpu is None or self._on_gpu.residency is not runtime.residency:
            self._on_gpu = LayerOnGpu.of(self.slots, module, runtime)
        return self._on_gpu

    def to(self, device: torch.device) -> None:
        """Move the tables to where the router's output is."""
        self.slots = self.slots.to(device)


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
    if len(hidden) == 1 and runtime.gpu is not None:
        found = handle.on_gpu(self, runtime).output(self, hidden, index, weights)
        if found is not None:
            return found.view(hidden_states.shape)
    if len(hidden) == 1 and hidden.device.type == "cpu":
        return _one_token(self, handle, runtime, hidden, index, weights).view(hidden_states.shape)
    total = _tokens(self, handle, runtime, hidden, index, weights)
    handle.slots.add_constants(total, index, weights)
    return total.to(hidden_states.dtype).view(hidden_states.shape)


def _one_token(
    module: nn.Module,
    handle: LayerHandle,
    runtime: Runtime,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """[1, H], [1, K], [1, K] -> [1, H], in the format of ``hidden``."""
    found = handle.whole(module, runtime).output(hidden, index, weights)
    return through_cache(module, hidden, index, weights) if found is None else found


def through_cache(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The routed experts' output for one token on a CPU, prototypes being read where they are not there.

    [1, H], [1, K], [1, K] -> [1, H], in the format of ``hidden``: the same bits as of ``LayerHandle.whole``. The
    runtime of ``module`` is there.
    """
    handle: LayerHandle = getattr(module, HANDLE)
    runtime = handle.runtime
    assert runtime is not None, "the caller has looked"
    slots, gates = index[0].tolist(), weights[0].tolist()
    merged = handle.slots.slot_map.merge(slots, gates)
    numbers = list(merged)
    ahead = () if runtime.prefetcher is None else runtime.prefetcher.next(handle.layer, hidden)
    experts = runtime.residency.resident(numbers)
    if not numbers:
        out = torch.empty(0, hidden.shape[1], dtype=sum_dtype(hidden))
    elif experts is not None:
        if ahead:
            runtime.residency.prefetch(ahead, keep=numbers)
        out = runtime.arithmetic.one_token(module, experts, hidden)  # [n, H]
    else:
        out = torch.empty(len(numbers), hidden.shape[1], dtype=sum_dtype(hidden))

        def compute(positions: Sequence[int], some: Sequence[StoredExpert]) -> None:
            out[list(positions)] = runtime.arithmetic.one_token(module, some, hidden)

        runtime.residency.visit(numbers, compute, ahead=ahead)
    constants = handle.slots.gated_constants(slots, gates)
    return runtime.arithmetic.combine(out, list(merged.values()), hidden.dtype, constants)


def _tokens(
    module: nn.Module,
    handle: LayerHandle,
    runtime: Runtime,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """[T, H], [T, K], [T, K] -> [T, H] in the format of the sums."""
    routes = handle.slots.routes(index, weights)
    total = torch.zeros(hidden.shape, dtype=sum_dtype(hidden), device=hidden.device)

    def apply(position: int, expert: StoredExpert) -> tuple[Tensor, Tensor]:
        span = slice(routes.starts[position], routes.starts[position + 1])
        rows = routes.rows[span]
        out = runtime.arithmetic.rows(module, expert, hidden[rows])  # [n, H]
        return rows, out * routes.weights[span].unsqueeze(1)

    if len(hidden) >= MANY_ROWS:  # in the order of the numbers, each added as it comes

        def add(positions: Sequence[int], experts: Sequence[StoredExpert]) -> None:
            for position, expert in zip(positions, experts, strict=True):
                total.index_add_(0, *apply(position, expert))  # a prototype sees a token once

        runtime.residency.visit(routes.prototypes, add, scan=True)
        return total
    found = [(routes.rows, hidden)] * len(routes.prototypes)
    # After the router's choices were read back, so that this does not wait for anything but itself.
    prefetcher = runtime.prefetcher if len(hidden) == 1 else None
    ahead = () if prefetcher is None else prefetcher.next(handle.layer, hidden)

    def keep(positions: Sequence[int], experts: Sequence[StoredExpert]) -> None:
        for position, expert in zip(positions, experts, strict=True):
            found[position] = apply(position, expert)

    runtime.residency.visit(routes.prototypes, keep, ahead=ahead)
    for rows, out in found:
        total.index_add_(0, rows, out)
    return total
