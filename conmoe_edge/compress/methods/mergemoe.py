"""MergeMoE (arXiv 2510.14436, section 4): the outputs of a cluster's experts are merged, not their weights.

1. The M experts of a layer with the most tokens are the centres; each of the others joins the centre
   that is most like it in cosine of the concatenated [W_up; W_gate].
2. What a cluster C should give is the mixture  y(t) = sum over j in C of b_j f_j(h_t)  with
   b_j = n_j / sum of n over C, n_j the tokens that chose j (the paper's matrix B, Theorem 1).
3. Gate and up of the merged expert are the averages of the members' rows with the same b_j (T2, T3),
   without aligning neurons.
4. With these fixed, its activations p(t) are known, and its down projection is the least squares fit
   of y(t) by W p(t). The paper writes it as W'_D T1 with T1 = Q P^+; that is the same W.
5. All slots of a cluster lead there, the router stays, so that gates add up (the matrix A).

The paper takes the layers back to front, so that each is fitted on what the untouched layers before it
give. Here they come front to back, but on the stream of the original, which is the same activations.

Not as published: the fit is a ridge regression that is held at the average of the members' down
projections, W = W0 + C (G + lambda)^-1 with the sums of ``least_squares`` over what W0 p(t) leaves of
y(t), since the bare one fails with few tokens. It takes the tokens that chose a member of the cluster;
the paper does not say which it takes. Where these are fewer than ``TOKENS_PER_NEURON`` times the
neurons, or a norm follows the down projection, W0 stays and a note says so. Only scopes of one layer:
a member has no output for the tokens of another layer. docs/methods-merging.md says more.

Peak memory: for the cluster that is merged [I, I] twice and [H, I] in fp64, two of its experts in fp64,
and the activations of ``_CHUNK`` tokens; before that a block of rows of all experts (64 MiB).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conmoe_edge.compress.methods.grouped import (
    forced_dtype,
    grouped,
    layers_of,
    merged_groups,
    unused_note,
    usage_of,
)
from conmoe_edge.compress.methods.interface import (
    Decision,
    Method,
    Needs,
    Parts,
    ScopeView,
    identity,
)
from conmoe_edge.compress.solvers.grouping import Groups, around_dominant
from conmoe_edge.compress.solvers.least_squares import LeastSquares
from conmoe_edge.compress.solvers.merge import shares, weighted_mean
from conmoe_edge.model.experts import inner_activations

TOKENS_PER_NEURON = 4
"""Routed tokens that a fit needs, times the neurons of an expert."""
RIDGE = 1e-3
_CHUNK = 4096
_BLOCK_BYTES = 64 << 20


def decide(scope: ScopeView, keep: int) -> Decision:
    """``keep`` merged experts for one layer."""
    if keep >= len(scope.pool):
        return identity(scope)
    (layer,) = scope.layers
    assert layer.tokens is not None, "MergeMoE needs the tokens"
    slots, hidden = layer.tokens.slots, layer.tokens.hidden
    usage = usage_of(scope)
    groups = around_dominant(usage, input_likeness(scope), keep)

    def merge(members: tuple[int, ...]) -> Parts:
        whole = [scope.weights.parts(scope.pool[one]) for one in members]
        weights = shares([usage[one] for one in members])
        # Rounded as it will be stored, so that the fit is to what will run.
        mean = {
            name: part.to(whole[0][name].dtype)
            for name, part in weighted_mean(whole, weights).items()
        }
        rows = _rows(slots, members)
        if not _fits(scope, len(rows), mean):
            return mean
        return {**mean, "down_proj": fitted_down(scope, whole, weights, mean, hidden[rows])}

    notes = _notes(scope, groups, slots) + unused_note(scope, groups, usage)
    return grouped(scope, groups, merge, notes)


def input_likeness(scope: ScopeView) -> Tensor:
    """float64 [E, E]: cosine of the concatenated up and gate projections of all pairs of experts."""
    name = "gate_up_proj" if scope.module.has_gate else "up_proj"
    parts = [scope.weights.parts(expert)[name] for expert in scope.pool]  # views
    gram = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    step = max(1, _BLOCK_BYTES // (4 * len(parts) * parts[0].shape[1]))
    for start in range(0, parts[0].shape[0], step):
        # The order of gate and up inside does not matter to inner products.
        block = torch.stack([part[start : start + step].float().flatten() for part in parts])
        gram += (block @ block.T).double().cpu()
    gram = gram.tril() + gram.tril(-1).T  # some BLAS sum the two halves in different orders
    norms = gram.diagonal().clamp(min=0).sqrt().clamp(min=1e-300)
    return gram / (norms[:, None] * norms[None, :])


def fitted_down(
    scope: ScopeView,
    members: Sequence[Parts],
    weights: Sequence[float],
    mean: Parts,
    hidden: Tensor,
) -> Tensor:
    """The down projection with which the averaged expert comes closest to the mixture of its members.

    Args:
        scope: layout, dtype and device of the computation.
        members: their tensors.
        weights: b_j, adding up to 1.
        mean: tensors of the averaged expert. The mixture of the members' output biases is its own
            bias already, so the fit is without.
        hidden: [n, H], the cluster's tokens.

    Returns:
        fp32, in the module's layout, where ``mean`` is.
    """
    module, device, dtype = scope.module, scope.device, forced_dtype(scope)

    def inner(chunk: Tensor, parts: Parts) -> Tensor:
        moved = {name: part.to(device) for name, part in parts.items()}
        return inner_activations(module, chunk, moved, dtype).float()  # [n, I]

    def rows(parts: Parts) -> Tensor:
        down = parts["down_proj"].to(device).float()
        return down if module.is_transposed else down.T  # [I, H]

    start = rows(mean)
    system = LeastSquares(*start.shape)
    for piece in hidden.split(_CHUNK):
        chunk = piece.to(device)
        features = inner(chunk, mean)
        left = features @ start * -1.0  # [n, H]
        for parts, weight in zip(members, weights, strict=True):
            if weight > 0.0:
                left.addmm_(inner(chunk, parts), rows(parts), alpha=weight)
        system.add(features, left)
    found = start + system.solve(RIDGE).T.float().to(device)
    found = found.to(mean["down_proj"].device)
    return found if module.is_transposed else found.T


def _rows(slots: Tensor, members: Sequence[int]) -> Tensor:
    """int64 [n]: the tokens that chose one of the members."""
    return torch.isin(slots, torch.tensor(members)).any(1).nonzero().squeeze(1)


def _fits(scope: ScopeView, tokens: int, parts: Parts) -> bool:
    return not scope.module.has_post_expert_norm and tokens >= _needed(scope, parts)


def _needed(scope: ScopeView, parts: Parts) -> int:
    """Tokens that a fit needs."""
    neurons = parts["down_proj"].shape[0 if scope.module.is_transposed else 1]
    return TOKENS_PER_NEURON * neurons


def _notes(scope: ScopeView, groups: Groups, slots: Tensor) -> tuple[str, ...]:
    """Where down projections are not fitted, and why."""
    together = merged_groups(groups)
    if not together:
        return ()
    if scope.module.has_post_expert_norm:
        return (
            f"{layers_of(scope)}: a norm follows the down projections, so they are averaged and not fitted.",
        )
    needed = _needed(scope, scope.weights.parts(scope.pool[0]))
    few = sum(len(_rows(slots, members)) < needed for members in together)
    if not few:
        return ()
    return (
        f"{layers_of(scope)}: fewer than {needed} calibration tokens came to {few} of {len(together)} merged "
        "experts; their down projections are averaged and not fitted. --calibration-tokens takes more.",
    )


MERGEMOE = Method(
    "mergemoe",
    "MergeMoE",
    "arXiv 2510.14436",
    decide,
    Needs(tokens=True),
    within_layers=True,
)
