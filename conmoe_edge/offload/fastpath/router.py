"""The router of one token, in one call of the operator.

``FusedRouter`` stands in front of the ``forward`` of a router of a listed class (``supported.py``). A router with
closed slots (``model/rerouting.py``) has a ``forward`` of its own and is left alone. It answers for single tokens from
the first one on, whatever is resident, so a token's route is the same whatever memory there is.

Memory: a few numbers.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.quantise import stored
from conmoe_edge.offload.fastpath.supported import Refusal, Router, look_up
from conmoe_edge.offload.kernels.cpu.bindings import Operator, RouterTable


class FusedRouter:
    """Stands in front of the ``forward`` of a router of a loaded model, for inference only."""

    def __init__(self, module: nn.Module, table: RouterTable, engine: Operator) -> None:
        """For ``module``, which computes ``table``."""
        self._own = weakref.WeakMethod(module.forward)
        self._parameters = module._parameters
        self._table, self._engine = table, engine
        self._place = module._parameters["weight"].data_ptr()  # pyright: ignore[reportOptionalMemberAccess]

    def current(self) -> RouterTable | None:
        """The router, as long as its weight lies where it lay."""
        place = self._parameters["weight"].data_ptr()  # pyright: ignore[reportOptionalMemberAccess]
        return self._table if place == self._place else None

    def __call__(self, hidden_states: Tensor) -> Any:
        """[..., H] -> logits [T, E], gates [T, K], slots [T, K]."""
        x = hidden_states
        if x.numel() == self._table.hidden and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            table = self.current()
            if table is not None:
                return self._engine.route(table, x.contiguous())
        own = self._own()
        assert own is not None, "the module is being called, so it is there"
        return own(hidden_states)


def router_table(module: nn.Module, engine: Operator) -> RouterTable | Refusal:
    """The router ``module`` for the operator."""
    spec = look_up(module, Router)
    if isinstance(spec, Refusal):
        return spec
    name, weight = type(module).__name__, module._parameters.get("weight")
    if weight is None or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return Refusal(f"the weight of {name} is not bf16 on the CPU")
    matrix = engine.prepare(stored("plain", weight.detach(), None))
    chosen = getattr(module, "top_k", None)
    if matrix is None or not isinstance(chosen, int) or chosen > len(weight):
        return Refusal(f"{name} has sizes that the operator does not take")
    normed = getattr(module, spec.normed) if isinstance(spec.normed, str) else spec.normed
    return RouterTable(matrix, chosen, bool(normed), narrow=not spec.wide_gates)


def fused_router(module: nn.Module, engine: Operator) -> FusedRouter | Refusal:
    """What stands in front of ``module``'s ``forward``."""
    table = router_table(module, engine)
    return table if isinstance(table, Refusal) else FusedRouter(module, table, engine)
