"""HC-SMoE (arXiv 2410.08589, section 3): experts that give alike on average are merged.

1. An expert is represented by its mean output over the calibration tokens, all of them, not only
   those that the router sent to it:  o_e = 1/T * sum over t of f_e(h_t).
2. Agglomerative clustering of the o_e by Euclidean distance with average linkage, down to K clusters
   (``solvers/grouping.py``).
3. A cluster becomes the mean of its experts, weighted by how many tokens chose them (``solvers/merge.py``). All
   its slots lead there, the router stays, so that the gates of a cluster add up.

As published but for this: the mean is taken over at most ``SAMPLE_TOKENS`` of the tokens, evenly spread
(the authors' 32 sequences are some 65,000); a cluster that no token came to is averaged with equal
weights; with a scope of several layers, which the paper has not, each expert sees the tokens of its own
layer, and clusters may span the layers. An expert alone in its cluster stays bit for bit.
docs/methods-merging.md says more.

The mean of outputs is the down projection of the mean of the inner activations, so the down projection
is computed once an expert, unless a norm follows it.

Peak memory: the sample [T, H], the activations of ``_CHUNK`` tokens, one expert in the dtype of the
computation (two in fp64 while merging).
"""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe_edge.compress.methods.grouped import forced_dtype, grouped, unused_note, usage_of
from conmoe_edge.compress.methods.interface import (
    Decision,
    Method,
    Needs,
    Parts,
    ScopeView,
    identity,
)
from conmoe_edge.compress.solvers.grouping import Groups, average_linkage
from conmoe_edge.compress.solvers.merge import weighted_mean
from conmoe_edge.errors import UsageError
from conmoe_edge.model.experts import expert_forward, inner_activations

SAMPLE_TOKENS = 16384
"""Tokens that every expert runs on."""
_CHUNK = 4096


def decide(scope: ScopeView, keep: int) -> Decision:
    """``keep`` merged experts for one scope.

    Raises:
        UsageError: several layers, and a norm behind each expert.
    """
    if keep >= len(scope.pool):
        return identity(scope)
    if scope.module.has_post_expert_norm and len(scope.layers) > 1:
        raise UsageError(  # only the last layer's norm is at hand
            "hc-smoe shares prototypes of this model within a layer only.",
            "a norm that belongs to its layer follows the experts",
            "--scope 1, or --method conmoe",
        )
    usage = usage_of(scope)
    clusters = average_linkage(mean_outputs(scope), keep)

    def merge(members: tuple[int, ...]) -> Parts:
        parts = (scope.weights.parts(scope.pool[one]) for one in members)
        return weighted_mean(parts, [usage[one] for one in members])

    groups = _named(clusters, usage)
    return grouped(scope, groups, merge, unused_note(scope, groups, usage))


def _named(clusters: tuple[tuple[int, ...], ...], usage: tuple[int, ...]) -> Groups:
    """A cluster goes by its most used expert; of equally used ones by the first."""
    core_of = [0] * len(usage)
    for members in clusters:
        core = max(members, key=lambda one: (usage[one], -one))
        for one in members:
            core_of[one] = core
    return Groups(tuple(sorted(set(core_of))), tuple(core_of))


def mean_outputs(scope: ScopeView) -> Tensor:
    """fp64 [P, H] on the host: o_e of every expert of the pool."""
    dtype = forced_dtype(scope)
    found = []
    for layer in scope.layers:
        assert layer.tokens is not None, "HC-SMoE needs the tokens"
        hidden = layer.tokens.sample(SAMPLE_TOKENS).hidden.to(scope.device, dtype)
        for expert in scope.pool:
            if expert.layer == layer.layer:
                parts = scope.weights.parts(expert)
                moved = {name: part.to(scope.device, dtype) for name, part in parts.items()}
                found.append(_mean_output(scope, hidden, moved, dtype))
    return torch.stack(found)


def _mean_output(scope: ScopeView, hidden: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
    """fp64 [H]."""
    module = scope.module
    through = expert_forward if module.has_post_expert_norm else inner_activations
    total: Tensor | float = 0.0
    for chunk in hidden.split(_CHUNK):
        total = total + through(module, chunk, parts, dtype).sum(0, dtype=torch.float64)
    mean = torch.as_tensor(total).cpu() / max(1, len(hidden))
    if module.has_post_expert_norm:
        return mean
    down = parts["down_proj"].double().cpu()
    out = mean @ down if module.is_transposed else down @ mean
    bias = parts.get("down_proj_bias")
    return out if bias is None else out + bias.double().cpu()


HC_SMOE = Method("hc-smoe", "HC-SMoE", "arXiv 2410.08589", decide, Needs(tokens=True))
