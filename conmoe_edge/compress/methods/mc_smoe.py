"""MC-SMoE (arXiv 2310.01334): M-SMoE, and every merged matrix as low rank plus a few columns.

1. The experts are merged as in ``m_smoe``.
2. Each matrix of a merged expert becomes  left right + kept columns  (``solvers/low_rank.py``), fitted to the
   inputs that the slots of the group get, weighted by their gates: what enters the layer for gate and
   up, and what the merged expert's own gate and up make of it for down. Biases stay.

The authors find the factors by training on the task, and prune the columns as it goes on; here
nothing is trained, both are closed forms. Gate and up have the same input and are factored
as the one matrix that they lie in. Rank and number of columns follow from the shape of a matrix
(``checkpoint/format/forms.py::factored_sizes``), so a package's bytes are known before.

With rate 0 nothing is merged, and every expert is factored all the same: the precision says so.

Peak memory: what ``m_smoe`` and ``low_rank`` take, and the Gram matrix of one projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import factored_sizes
from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.compress.methods.interface import Decision, Method, Needs, Parts, ScopeView
from conmoe_edge.compress.methods.m_smoe import groups_of, merged
from conmoe_edge.compress.solvers.facility import slot_map_of, weights_of
from conmoe_edge.compress.solvers.low_rank import factor
from conmoe_edge.model.experts import inner_activations
from conmoe_edge.plan.levers import LOW_RANK

_BATCH = 4096


def decide(scope: ScopeView, keep: int) -> Decision:
    """``keep`` merged and factored experts for one layer."""
    groups = groups_of(scope, keep)
    decision = merged(scope, groups)
    (layer,) = scope.layers
    tokens = layer.tokens
    assert tokens is not None and decision.parts is not None, "MC-SMoE needs the tokens"
    merge, slot_map = decision.parts, slot_map_of(layer.layer, groups.core_of)
    alpha = weights_of(slot_map, tokens.slots, tokens.gates)

    def parts(core: ExpertId) -> Parts:
        gates = alpha[:, decision.prototypes.index(core)]
        return factored(scope, merge(core), tokens.hidden, gates)

    return replace(decision, parts=parts)


def factored(scope: ScopeView, parts: Parts, hidden: Tensor, gates: Tensor) -> dict[str, Tensor]:
    """One expert as a record of low rank has it.

    Args:
        scope: for module, device and dtype.
        parts: the expert.
        hidden: [T, H], the layer's tokens.
        gates: fp32 [T], the routing weight with which each comes here; 0 for those that do not.
    """
    rows = gates.nonzero().squeeze(1)
    moved = {name: part.to(scope.device, scope.dtype) for name, part in parts.items()}

    def entering(batch: Tensor) -> Tensor:
        return hidden[batch].to(scope.device, scope.dtype)

    def inside(batch: Tensor) -> Tensor:
        return inner_activations(scope.module, entering(batch), moved, scope.dtype)

    found: dict[str, Tensor] = {}
    for name, part in parts.items():
        if part.dim() != 2:
            found[name] = part
            continue
        weight = part.to(scope.device).T if scope.module.is_transposed else part.to(scope.device)
        inputs = inside if name == "down_proj" else entering
        gram = _gram(rows, gates, inputs, weight.shape[1])
        found.update(
            factor(weight, gram.to(weight.device), *factored_sizes(*weight.shape)).named(name)
        )
    return found


def _gram(rows: Tensor, gates: Tensor, inputs: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """float64 [C, C]: sum over the rows of gate^2 x x^T."""
    total = torch.zeros(size, size, dtype=torch.float64)
    for batch in rows.split(_BATCH):
        values = inputs(batch).float()
        values = values * gates[batch].to(values.device).unsqueeze(1)
        total += (values.T @ values).cpu()
    return total


MC_SMOE = Method(
    "mc-smoe",
    "MC-SMoE",
    "arXiv 2310.01334",
    decide,
    Needs(tokens=True, logits=True),
    precision=LOW_RANK,
    within_layers=True,
)
