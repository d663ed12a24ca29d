"""The router of one token, in one call of the operator.

``FusedRouter`` stands in front of the ``forward`` of a router of a listed class (``supported.py``). A router with
closed slots (``model/rerouting.py``) has a ``forward`` of its own and is left alone. It answers for single tokens from
the first one on, whatever is resident, so a token's route is the same whatever memory there is.

Memory: a few numbers.
"""

from __future__ import annotations

import weakref
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.quantise import stored
from conmoe_edge.offload.compute.steady_rows import padded
from conmoe_edge.offload.fastpath.supported import Part, Refusal, Router, look_up
from conmoe_edge.offload.kernels.cpu.bindings import Operator, RouterTable

_FORMATS = (torch.bfloat16, torch.float32)


class FusedRouter:
    """Stands in front of the ``forward`` of a router of a loaded model, for inference only."""

    def __init__(self, module: nn.Module, spec: Router, engine: Operator) -> None:
        """For a module that ``fused_router`` takes."""
        self._own = weakref.WeakMethod(module.forward)
        self._module = weakref.ref(module)
        self._spec, self._engine = spec, engine
        inner = module.get_submodule(spec.linear)
        self._parameters = inner._parameters
        self._table: RouterTable | None = None
        self._key: tuple[Any, ...] = ()

    def current(self, correction: Tensor | None = None) -> RouterTable | None:
        """The router as its weight lies now, with the ``correction`` that its block calls it with."""
        weight = self._parameters["weight"]
        key = (weight.data_ptr(), None if correction is None else correction.data_ptr())  # pyright: ignore[reportOptionalMemberAccess]
        if key != self._key:
            module = self._module()
            made = None if module is None else _table(module, self._spec, self._engine, correction)
            self._key, self._table = key, None if isinstance(made, Refusal) else made
        return self._table

    def __call__(self, hidden_states: Tensor, correction: Tensor | None = None) -> Any:
        """[..., H] -> logits [T, E], gates [T, K], slots [T, K]."""
        x = hidden_states
        if x.numel() == x.shape[-1] and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            table = self.current(correction)
            if table is not None and x.numel() == table.hidden:
                logits, gates, slots = self._engine.route(table, x.contiguous())
                return logits.float() if self._spec.wide_logits else logits, gates, slots
        own = self._own()
        assert own is not None, "the module is being called, so it is there"
        rows = x.reshape(-1, x.shape[-1])
        wide = padded(rows)
        if wide is not rows:
            x = wide.view(*[1] * (x.dim() - 2), *wide.shape)
        made = own(x) if correction is None else own(x, correction)
        return made if wide is rows else tuple(one[: len(rows)] for one in made)


def fused_router(module: nn.Module, engine: Operator) -> FusedRouter | Refusal:
    """What stands in front of ``module``'s ``forward``."""
    spec = look_up(module, Router)
    if isinstance(spec, Refusal):
        return spec
    for child in module.children():
        part = look_up(child, Part)
        if not isinstance(child, nn.Linear) and isinstance(part, Refusal):
            return part
    made = _table(module, spec, engine, None)
    return made if isinstance(made, Refusal) else FusedRouter(module, spec, engine)


def _table(
    module: nn.Module, spec: Router, engine: Operator, correction: Tensor | None
) -> RouterTable | Refusal:
    """The router ``module`` for the operator."""
    name, inner = type(module).__name__, module.get_submodule(spec.linear)
    weight, bias = inner._parameters.get("weight"), inner._parameters.get("bias")
    formats = _FORMATS[1:] if spec.wide_weight else _FORMATS if spec.exact else _FORMATS[:1]
    if weight is None or weight.dtype not in formats or weight.device.type != "cpu":
        return Refusal(f"the weight of {name} is not in a format for this on the CPU")
    matrix = engine.prepare(stored("plain", weight.detach(), None))
    chosen: Any = spec.chosen or getattr(module, "top_k", None)
    if matrix is None or not isinstance(chosen, int):
        return Refusal(f"{name} has sizes that the operator does not take")
    if spec.correction:
        correction = attrgetter(spec.correction)(module)
    grouped = spec.groups and getattr(module, "num_group") > 1  # noqa: B009
    if spec.groups_if:
        method = getattr(module, spec.groups_if[0])
        if method not in ("greedy", spec.groups_if[1]):
            return Refusal(f"{name} with {spec.groups_if[0]}={method}")
        grouped = method != "greedy"
    normed = getattr(module, spec.normed) if isinstance(spec.normed, str) else spec.normed
    try:
        return RouterTable(
            matrix,
            chosen,
            bool(normed),
            not spec.wide_gates,
            scores=spec.scores,
            bias=None if bias is None else bias.detach(),
            correction=None if correction is None else correction.detach().float().flatten(),
            groups=getattr(module, "num_group") if grouped else 1,  # noqa: B009
            kept=getattr(module, "topk_group") if grouped else 1,  # noqa: B009
            pairs=grouped and spec.pairs,
            scaling=float(getattr(module, spec.scaling)) if spec.scaling else 1.0,
            epsilon=spec.epsilon,
            least=float(getattr(module, spec.least)) if spec.least else 0.0,
            jitter=float(getattr(module, spec.jitter)) if spec.jitter else 0.0,
            exact=spec.exact,
            stepwise=spec.stepwise,
        )
    except ValueError as error:
        return Refusal(f"{name}: {error}")
