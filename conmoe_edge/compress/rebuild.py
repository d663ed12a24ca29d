"""The prototypes of a layer trimmed and refitted, once it is known who stands for whom; and what that is worth.

``trim`` takes the neurons that its slots miss least out of every prototype, then ``refit`` solves the
down projections and the constants of the layer together against its target. ``error_on`` measures a
decision on tokens, which need not be those that it was fitted on.

Peak memory: the activations of all routed tokens (sum of n_p * I' in fp32), those of one prototype
before it is trimmed, and what ``refit`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conmoe_edge.checkpoint.manifest import ExpertId, SlotRecord
from conmoe_edge.compress.facility import weights_of
from conmoe_edge.compress.interface import Decision, Parts, ScopeView
from conmoe_edge.compress.layer_tokens import LayerTokens
from conmoe_edge.compress.refit import Features, refit
from conmoe_edge.compress.taps import MappedTap, expert_sum
from conmoe_edge.compress.trim import corrected, surviving, take_neurons
from conmoe_edge.model.experts import inner_activations


@dataclass(frozen=True, slots=True)
class StandIns:
    """Who stands for whom in one layer: ``prototypes`` ascending; for every slot its prototype and scale.

    ``neurons``: those that a prototype keeps, int64, ascending; where it is not named, they are
    looked for among its own, as many as the scope allows.
    """

    prototypes: tuple[int, ...]
    slots: tuple[tuple[int | None, float], ...]
    neurons: Mapping[int, Tensor] = field(default_factory=dict)


def rebuild(
    scope: ScopeView,
    tokens: LayerTokens,
    chosen: StandIns,
    own: Sequence[Features] | None = None,
) -> Decision:
    """Prototypes with all that is solved for them, fitted on ``tokens``.

    ``own``: ``activations`` of every expert of the pool on the same tokens, each weighted with its own gates,
    where they are there.
    """
    layer = scope.layers[0].layer
    gates = gates_of(tokens, len(scope.pool))
    alpha = weights_of(tokens.slots, tokens.gates, chosen.slots, chosen.prototypes)
    found: dict[ExpertId, Parts] = {}
    features: list[Features] = []
    for position, expert in enumerate(chosen.prototypes):
        alone = [slot for slot, (p, _) in enumerate(chosen.slots) if p == expert] == [expert]
        whole = own[expert] if own is not None and alone else None
        if whole is None:
            whole = activations(scope, tokens, expert, alpha[:, position])
        parts, one = prototype(scope, expert, whole, chosen.neurons.get(expert))
        found[scope.pool[expert]] = parts
        features.append(one)
    names = [scope.pool[expert] for expert in chosen.prototypes]
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
            None if expert is None else scope.pool[expert],
            scale,
            slot if constants else None,
        )
        for slot, (expert, scale) in enumerate(chosen.slots)
    )
    widths = {name: one.values.shape[1] for name, one in zip(names, features, strict=True)}
    return Decision(tuple(names), slots, constants, parts=found.__getitem__, widths=widths)


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


def activations(scope: ScopeView, tokens: LayerTokens, expert: int, alpha: Tensor) -> Features:
    """All neurons of a pretrained expert on the tokens where its routing weight ``alpha`` [T] is not 0."""
    rows = alpha.nonzero().squeeze(1)
    hidden = tokens.hidden[rows].to(scope.device, scope.dtype)
    inner = inner_activations(scope.module, hidden, whole_parts(scope, expert), scope.dtype)
    values = inner.float().cpu() * alpha[rows].unsqueeze(1)  # [n, I]
    return Features(rows, values, values.T @ values)


def down_rows(scope: ScopeView, expert: int) -> Tensor:
    """fp32 [H, I] on the host: the down projection of a pretrained expert."""
    return _as_rows(scope, scope.weights.parts(scope.pool[expert])["down_proj"]).float().cpu()


def prototype(
    scope: ScopeView, expert: int, whole: Features, neurons: Tensor | None
) -> tuple[dict[str, Tensor], Features]:
    """A prototype with the neurons that stay, in fp32 on the host, and its activations."""
    down = down_rows(scope, expert)
    if neurons is None:
        neurons, weight = surviving(whole.gram, down, scope.widths[-1])
    else:
        weight = corrected(whole.gram, down, neurons)
    parts = {name: part.float().cpu() for name, part in whole_parts(scope, expert).items()}
    kept = take_neurons(scope.module, parts, neurons)
    kept["down_proj"] = _as_rows(scope, weight)
    if len(neurons) == whole.values.shape[1]:
        return kept, whole
    values = whole.values[:, neurons].contiguous()
    return kept, Features(whole.rows, values, whole.gram[neurons][:, neurons])


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
