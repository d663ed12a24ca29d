"""``auto``: prototypes that stand in for others by measured error, trimmed and refitted layer after layer.

The layers are taken one after another on the stream of the model as it has become so far, and every
layer aims at what the *original* residual stream was behind it, so that it also makes up for what
the layers before it lost:

1. Every expert runs on a sample of tokens; ``closed_form`` says at which error each could stand in for
   each slot. ``facility`` keeps those with which the sum of errors is least; every other slot becomes
   prototype x scale + constant, or a constant alone. The router stays.
2. Part of the reduction is neurons instead of experts (``plan/trim.py``): ``trim`` removes the
   cheapest of every prototype.
3. ``refit`` solves the down projections of all prototypes and the constants of all slots together.

Weights of prototypes change, other than with ConMoE. Parts of this are known: facility location and
replaceability from ConMoE (arXiv 2605.29350), constants from MoNE (2507.00390), least squares for the
down projection from MergeMoE (2510.14436), working on the compressed stream from REAM (2604.04356),
neurons as the unit from CAMERA-P and MoE-Slimming (2606.18304), the cost of a neuron from the optimal
brain surgeon. docs/auto.md says what it is worth.

Peak memory: that of ``refit`` beside the layer's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from conmoe_edge.checkpoint.manifest import ExpertId, SlotRecord
from conmoe_edge.compress.closed_form import SAMPLE_TOKENS, slot_errors
from conmoe_edge.compress.facility import assign, select, weights_of
from conmoe_edge.compress.layer_tokens import LayerTokens
from conmoe_edge.compress.methods.interface import (
    Decision,
    Method,
    Needs,
    Parts,
    ScopeView,
    identity,
)
from conmoe_edge.compress.refit import Features, refit
from conmoe_edge.compress.trim import surviving, take_neurons
from conmoe_edge.model.experts import expert_forward, inner_activations


def decide(scope: ScopeView, keep: int) -> Decision:
    """Prototypes, slots, constants and new weights of one layer; ``keep`` prototypes of ``scope.width`` neurons."""
    (layer,) = scope.layers
    tokens = layer.tokens
    assert tokens is not None and tokens.target is not None, (
        "auto needs the tokens and their target"
    )
    width = _width(scope)
    if keep >= len(scope.pool) and scope.width >= width:
        return identity(scope)
    experts = len(scope.pool)

    def forward(expert: int, hidden: Tensor) -> Tensor:
        moved = hidden.to(scope.device, scope.dtype)
        return expert_forward(scope.module, moved, _moved(scope, expert), scope.dtype)

    errors = slot_errors(tokens.sample(SAMPLE_TOKENS), experts, forward)
    prototypes = select(errors, keep)
    mapping = assign(errors, prototypes)
    alpha = weights_of(tokens.slots, tokens.gates, mapping, prototypes)
    found: dict[ExpertId, Parts] = {}
    features: list[Features] = []
    for position, prototype in enumerate(prototypes):
        parts, one = _trimmed(scope, tokens, prototype, alpha[:, position])
        found[scope.pool[prototype]] = parts
        features.append(one)
    names = [scope.pool[prototype] for prototype in prototypes]
    constants: Mapping[int, Tensor] = {}
    if not scope.module.has_post_expert_norm:
        residual = _target(scope, tokens, alpha, [found[name] for name in names])
        down = [_as_rows(scope, found[name]["down_proj"]) for name in names]
        down, table = refit(features, down, _gates(tokens, experts), residual)
        for name, weight in zip(names, down, strict=True):
            found[name] = {**found[name], "down_proj": _as_rows(scope, weight)}
        constants = {layer.layer: table}
    slots = tuple(
        SlotRecord(
            None if prototype is None else scope.pool[prototype],
            scale,
            slot if constants else None,
        )
        for slot, (prototype, scale) in enumerate(mapping)
    )
    return Decision(tuple(names), slots, constants, parts=found.__getitem__)


def _width(scope: ScopeView) -> int:
    return scope.weights.parts(scope.pool[0])["down_proj"].shape[
        0 if scope.module.is_transposed else 1
    ]


def _moved(scope: ScopeView, expert: int) -> dict[str, Tensor]:
    """One expert in the dtype and on the device of the computation."""
    parts = scope.weights.parts(scope.pool[expert])
    return {name: part.to(scope.device, scope.dtype) for name, part in parts.items()}


def _trimmed(
    scope: ScopeView, tokens: LayerTokens, prototype: int, alpha: Tensor
) -> tuple[dict[str, Tensor], Features]:
    """A prototype with the neurons that stay, in fp32 on the host, and its activations."""
    rows = alpha.nonzero().squeeze(1)
    parts = _moved(scope, prototype)
    hidden = tokens.hidden[rows].to(scope.device, scope.dtype)
    inner = inner_activations(scope.module, hidden, parts, scope.dtype)
    values = inner.float().cpu() * alpha[rows].unsqueeze(1)  # [n, I]
    down = _as_rows(scope, parts["down_proj"]).float().cpu()
    neurons, weight = surviving(values.T @ values, down, scope.width)
    kept = take_neurons(scope.module, {n: p.float().cpu() for n, p in parts.items()}, neurons)
    kept["down_proj"] = _as_rows(scope, weight.float())
    return kept, Features(rows, values[:, neurons].contiguous())


def _as_rows(scope: ScopeView, down: Tensor) -> Tensor:
    """Between a module's own layout of the down projection and [H, I]; the same way there and back."""
    return down.T if scope.module.is_transposed else down


def _gates(tokens: LayerTokens, experts: int) -> Tensor:
    """fp32 [T, E]: the gate of every slot that a token chose."""
    inside = torch.where((tokens.slots >= 0) & (tokens.slots < experts), tokens.slots, experts)
    gates = torch.zeros(len(tokens), experts + 1)
    gates.scatter_add_(1, inside, tokens.gates)
    return gates[:, :experts].contiguous()


def _target(scope: ScopeView, tokens: LayerTokens, alpha: Tensor, parts: list[Parts]) -> Tensor:
    """fp32 [T, H], a copy: what the down projections have to give, biases taken off."""
    assert tokens.target is not None
    target = tokens.target.float().clone()
    if "down_proj_bias" in parts[0]:
        biases = torch.stack([one["down_proj_bias"].float() for one in parts])  # [P, H]
        target.addmm_(alpha, biases, alpha=-1.0)
    return target


AUTO = Method(
    "auto",
    "auto",
    "this project",
    decide,
    Needs(tokens=True, target=True),
    trims=True,
    budgets=True,
)
