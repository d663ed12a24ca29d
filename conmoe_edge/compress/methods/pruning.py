"""The one-shot pruning family: experts are ranked by one number each, and the lowest are removed.

All published scores of this kind are points of one family (arXiv 2606.15716):

    S_e = N_e^-b * sum over t in D_e of g_e(t)^alpha * ||f_e(h_t)||^beta

with D_e the N_e tokens whose router chose e, g_e the gate that the model multiplies its output f_e
with. ``POINTS`` names those that are in use. S_e = 0 for an expert that no token chose.

As published the router chooses among the experts that stay: every method here does so under its
plain name, and how is in ``model/rerouting.py``. Under ``NAME+drop`` the router is left alone and
a removed expert adds nothing. No weight is changed, every layer keeps the same number, and no expert
is kept for a reason outside its score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import SlotRecord
from conmoe_edge.compress.methods.interface import (
    Decision,
    LayerView,
    Method,
    ScopeView,
    identity,
)
from conmoe_edge.compress.solvers.ranking import survivors
from conmoe_edge.compress.stats.statistics import LayerStatistics
from conmoe_edge.model.rerouting import least_open

DROP = "+drop"


@dataclass(frozen=True, slots=True)
class Point:
    """A member of the family: the exponents b, alpha, beta, and where it comes from."""

    title: str
    source: str
    b: int
    alpha: int
    beta: int


POINTS = {
    "frequency": Point("Frequency", "arXiv 2606.15716", 0, 0, 0),
    "seer": Point("SEER", "arXiv 2606.15716", 0, 1, 0),
    "ean": Point("EAN", "arXiv 2606.15716", 0, 0, 1),
    "reap": Point("REAP", "arXiv 2510.13999", 1, 1, 1),
    "man": Point("MAN", "arXiv 2606.15716", 1, 0, 1),
    "msan": Point("MSAN", "arXiv 2606.15716", 1, 0, 2),
    "energy": Point("Energy", "arXiv 2606.15716", 0, 2, 2),
}


def score(point: Point, statistics: LayerStatistics) -> Tensor:
    """[E] float64: S_e(b, alpha, beta) of every expert of a layer."""
    sums = {
        (0, 0): statistics.counts,
        (1, 0): statistics.gates,
        (0, 1): statistics.norms,
        (1, 1): statistics.weighted_norms,
        (0, 2): statistics.squared_norms,
        (2, 2): statistics.energies,
    }[point.alpha, point.beta]
    counts = torch.tensor(statistics.counts, dtype=torch.float64)
    return torch.tensor(sums, dtype=torch.float64) / counts.clamp(min=1).pow(point.b)


def decide(point: Point, reroutes: bool, scope: ScopeView, keep: int) -> Decision:
    """The best ``keep`` experts stay as they are, all other slots are empty."""
    if keep >= len(scope.pool):
        return identity(scope)
    kept = set(
        survivors(
            [score(point, layer.statistics) for layer in scope.layers],
            keep,
            [floor_of(layer) if reroutes else 1 for layer in scope.layers],
            [groups_of(layer) if reroutes else 1 for layer in scope.layers],
        )
    )
    return Decision(
        tuple(expert for position, expert in enumerate(scope.pool) if position in kept),
        tuple(
            SlotRecord(expert if position in kept else None)
            for position, expert in enumerate(scope.pool)
        ),
        rerouted=frozenset(layer.layer for layer in scope.layers) if reroutes else frozenset(),
    )


def floor_of(layer: LayerView) -> int:
    """Experts that a layer cannot do without when its router is kept to them."""
    return layer.top_k if layer.selection is None else least_open(layer.selection)


def groups_of(layer: LayerView) -> int:
    """Groups of slots among which a layer's router chooses first."""
    return 1 if layer.selection is None else layer.selection.groups


ONE_SHOT = tuple(
    Method(
        name if reroutes else name + DROP,
        point.title if reroutes else f"{point.title}, router as it is",
        point.source,
        partial(decide, point, reroutes),
        reroutes=reroutes,
        keeps=True,
    )
    for reroutes in (True, False)
    for name, point in POINTS.items()
)
