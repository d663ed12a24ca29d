"""MoNE (arXiv 2507.00390): experts that vary little are replaced by what they give on average.

    phi_e = (1 / T) * sum over t in D_e of g_e(t)  *  || std over D_e of f_e(h_t) ||_2

with T tokens in all, D_e those whose router chose e, and the standard deviation taken dimension by
dimension. The experts with the lowest phi are removed; a slot of theirs gives the constant c_e = mean
over D_e of f_e(h_t), weighted by its gate as before. Router and gates are left alone.

The mean gate is over all tokens, as in the authors' code, so it is also how often an expert is
used. An expert that no token chose has phi = 0 and a constant of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import SlotRecord
from conmoe_edge.compress.methods.interface import Decision, LayerView, Method, Needs, ScopeView
from conmoe_edge.compress.methods.interface import identity as whole
from conmoe_edge.compress.solvers.ranking import survivors
from conmoe_edge.compress.stats.statistics import OutputVectors


def score(layer: LayerView) -> Tensor:
    """[E] float64: phi of every expert, times the number of tokens, which is the same for all."""
    gates = torch.tensor(layer.statistics.gates, dtype=torch.float64)
    return gates * torch.linalg.vector_norm(_vectors(layer).deviations(), dim=1)


def decide(scope: ScopeView, keep: int) -> Decision:
    """The best ``keep`` experts stay as they are, all other slots are constants."""
    if keep >= len(scope.pool):
        return whole(scope)
    layers = scope.layers
    kept = set(
        survivors([score(one) for one in layers], keep, [0] * len(layers), [1] * len(layers))
    )
    slots: list[SlotRecord] = []
    constants: dict[int, Tensor] = {}
    for layer in layers:
        rows: list[Tensor] = []
        means = _vectors(layer).means()
        for expert in range(layer.experts):
            position = len(slots)
            if position in kept:
                slots.append(SlotRecord(scope.pool[position]))
            else:
                slots.append(SlotRecord(None, constant=len(rows)))
                rows.append(means[expert].float())
        if rows:
            constants[layer.layer] = torch.stack(rows)
    names = tuple(expert for position, expert in enumerate(scope.pool) if position in kept)
    return Decision(names, tuple(slots), constants)


def _vectors(layer: LayerView) -> OutputVectors:
    assert layer.vectors is not None, "MoNE needs the experts' outputs"
    return layer.vectors


MONE = Method("mone", "MoNE", "arXiv 2507.00390", decide, Needs(vectors=True), constants=True)
