"""A dense gated layer for the operator: in place of experts, or beside them as a shared expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from conmoe_edge.checkpoint.format.quantise import Matrix
from conmoe_edge.offload.compute.fused_linear import FusedLinear
from conmoe_edge.offload.fastpath.attention import unchanged
from conmoe_edge.offload.fastpath.supported import Mlp, Refusal, look_up
from conmoe_edge.offload.kernels.cpu.bindings import MlpTable, Operator, Prepared


class DenseMlp:
    """A dense layer of a listed class, as its weights lie now."""

    def __init__(
        self, module: nn.Module, spec: Mlp, share: FusedLinear | None, engine: Operator
    ) -> None:
        """For a module that ``dense_mlp`` takes. ``share``: its output is times the sigmoid of this projection."""
        self._module, self._spec, self._engine = module, spec, engine
        self._parts = dict(module.named_children())
        linears: list[Any] = [self._parts[name] for name in spec.linears]
        self._linears: list[FusedLinear] = [*linears, *([] if share is None else [share])]
        self._shared = share is not None
        self._prepared: list[Prepared | None] = []
        self._table: MlpTable | None = None

    def current(self) -> MlpTable | None:
        """The table; ``None`` where a part was exchanged or has hooks, or the operator does not take the weights."""
        if not unchanged(self._module, self._parts):
            return None
        prepared = [one.prepared_for(torch.bfloat16) for one in self._linears]
        if len(prepared) != len(self._prepared) or any(
            one is not other for one, other in zip(prepared, self._prepared, strict=True)
        ):
            self._prepared = prepared
            self._table = self._tabled(list(prepared))
        return self._table

    def _tabled(self, prepared: list[Prepared | None]) -> MlpTable | None:
        biases = [None if one.bias is None else one.bias.detach() for one in self._linears]
        share = prepared.pop() if self._shared else None
        if self._shared and (share is None or biases.pop() is not None):
            return None
        if not self._spec.up:
            joined = prepared[0]
            if joined is None or biases[0] is not None:
                return None
            halves = _halves(joined.matrix)
            if halves is None:
                return None
            prepared[:1] = [self._engine.prepare(half) for half in halves]
            biases = [None, *biases]
        gate, up, down = prepared
        if gate is None or up is None or down is None:
            return None
        try:
            return MlpTable(gate, up, down, biases=(biases[0], biases[1], biases[2]), share=share)
        except ValueError:
            return None


def dense_mlp(
    module: nn.Module, engine: Operator, share: nn.Module | None = None
) -> DenseMlp | Refusal:
    """``module``, whose projections are the operator's already."""
    spec = look_up(module, Mlp)
    if isinstance(spec, Refusal):
        return spec
    name, children = type(module).__name__, dict(module.named_children())
    if set(children) != {*spec.linears, *([spec.act] if spec.act else [])}:
        return Refusal(f"{name} has other parts than its class")
    linears = [children[one] for one in spec.linears]
    if share is not None:
        linears.append(share)
    if not all(isinstance(one, FusedLinear) for one in linears):
        return Refusal(f"a projection of {name} is not the operator's")
    if spec.act and not isinstance(children[spec.act], nn.SiLU | SiLUActivation):
        return Refusal(f"{name} with {type(children[spec.act]).__name__}")
    return DenseMlp(module, spec, share, engine)  # pyright: ignore[reportArgumentType]


def _halves(matrix: Matrix) -> list[Matrix] | None:
    """The upper and the lower rows; ``None`` where that cuts a tile."""
    half = matrix.rows // 2
    try:
        return [matrix.part(slice(0, half)), matrix.part(slice(half, matrix.rows))]
    except ValueError:
        return None
