"""The prototypes of a layer trimmed and refitted, once it is known who stands for whom; and what that is worth.

``trim`` takes the neurons that its slots miss least out of every prototype, then ``refit`` solves the
down projections and the constants of the layer together against its target. ``error_on`` measures a
decision on tokens, which need not be those that it was fitted on.

Peak memory: the activations of all routed tokens (sum of n_p * I' in fp32), those of one prototype
before it is trimmed, and what ``refit`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe_edge.checkpoint.manifest import ExpertId, SlotRecord
from conmoe_edge.compress.facility import weights_of
from conmoe_edge.compress.layer_tokens import LayerTokens
from conmoe_edge.compress.methods.interface import Decision, Parts, ScopeView
from conmoe_edge.compress.refit import Features, refit
from conmoe_edge.compress.taps import MappedTap, expert_sum
from conmoe_edge.compress.trim import surviving, take_neurons
from conmoe_edge.model.experts import inner_activations


@dataclass(frozen=True, slots=True)
class StandIns:
    """Who stands for whom in one layer: ``prototypes`` ascending; for every slot its prototype and scale."""

    prototypes: tuple[int, ...]
    slots: tuple[tuple[int | None, float], ...]


def rebuild(scope: ScopeView, tokens: LayerTokens, chosen: StandIns) -> Decision:
    """Prototypes of ``scope.width`` neurons with all that is solved for them, fitted on ``tokens``."""
    layer = scope.layers[0].layer
    gates = gates_of(tokens, len(scope.pool))
    alpha = weights_of(tokens.slots, tokens.gates, chosen.slots, chosen.prototypes)
    found: dict[ExpertId, Parts] = {}
    features: list[Features] = []
    for position, prototype in enumerate(chosen.prototypes):
        parts, one = _prototype(scope, tokens, prototype, alpha[:, position])
        found[scope.pool[prototype]] = parts
        features.append(one)
    names = [scope.pool[prototype] for prototype in chosen.prototypes]
    constants: Mapping[int, Tensor] = {}
    if not scope.module.has_post_expert_norm:
        residual = _target(tokens, alpha, [found[name] for name in names])
        down = [_as_rows(scope, found[name]["down_proj"]) for name in names]
        down, table = refit(features, down, gates, residual)
        for name, weight in zip(names, down, strict=True):
            found[name] = {**found[name], "down_proj": _as_rows(scope, weight)}
        constants = {layer: table}
    slots = tuple(
        SlotRecord(
            None if prototype is None else scope.pool[prototype],
            scale,
            slot if constants else None,
        )
        for slot, (prototype, scale) in enumerate(chosen.slots)
    )
    return Decision(tuple(names), slots, constants, parts=found.__getitem__)


def error_on(scope: ScopeView, tokens: LayerTokens, decision: Decision) -> float:
    """Squared distance of the layer's routed output to its target, summed over ``tokens``."""
    assert tokens.target is not None
    parts_of = decision.parts or scope.weights.parts
    parts = {
        expert: {name: one.to(scope.device) for name, one in parts_of(expert).items()}
        for expert in decision.prototypes
    }
    tap = MappedTap(decision.slots, parts, decision.constants.get(scope.layers[0].layer))
    given = expert_sum(scope.module, tap, tokens, scope.device)
    return float((given.float() - tokens.target.float()).square().sum(dtype=torch.float64))


def whole_parts(scope: ScopeView, expert: int) -> dict[str, Tensor]:
    """One pretrained expert in the dtype and on the device of the computation."""
    parts = scope.weights.parts(scope.pool[expert])
    return {name: part.to(scope.device, scope.dtype) for name, part in parts.items()}


def gates_of(tokens: LayerTokens, experts: int) -> Tensor:
    """fp32 [T, E]: the gate of every slot that a token chose, 0 elsewhere."""
    inside = torch.where((tokens.slots >= 0) & (tokens.slots < experts), tokens.slots, experts)
    gates = torch.zeros(len(tokens), experts + 1)
    gates.scatter_add_(1, inside, tokens.gates)
    return gates[:, :experts].contiguous()


def _prototype(
    scope: ScopeView, tokens: LayerTokens, prototype: int, alpha: Tensor
) -> tuple[dict[str, Tensor], Features]:
    """A prototype with the neurons that stay, in fp32 on the host, and its activations."""
    rows = alpha.nonzero().squeeze(1)
    parts = whole_parts(scope, prototype)
    hidden = tokens.hidden[rows].to(scope.device, scope.dtype)
    inner = inner_activations(scope.module, hidden, parts, scope.dtype)
    values = inner.float().cpu() * alpha[rows].unsqueeze(1)  # [n, I]
    down = _as_rows(scope, parts["down_proj"]).float().cpu()
    gram = values.T @ values
    neurons, weight = surviving(gram, down, scope.width)
    kept = take_neurons(scope.module, {n: p.float().cpu() for n, p in parts.items()}, neurons)
    kept["down_proj"] = _as_rows(scope, weight.float())
    return kept, Features(rows, values[:, neurons].contiguous(), gram[neurons][:, neurons])


def _as_rows(scope: ScopeView, down: Tensor) -> Tensor:
    """Between a module's own layout of the down projection and [H, I]; the same way there and back."""
    return down.T if scope.module.is_transposed else down


def _target(tokens: LayerTokens, alpha: Tensor, parts: Sequence[Parts]) -> Tensor:
    """fp32 [T, H], a copy: what the down projections have to give, biases taken off."""
    assert tokens.target is not None
    target = tokens.target.float().clone()
    if "down_proj_bias" in parts[0]:
        biases = torch.stack([one["down_proj_bias"].float() for one in parts])  # [P, H]
        target.addmm_(alpha, biases, alpha=-1.0)
    return target
