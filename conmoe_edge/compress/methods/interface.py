"""What methods take and give: frozen dataclasses, no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from conmoe_edge.checkpoint.manifest import ExpertId, SlotRecord


@dataclass(frozen=True, slots=True)
class ScopeView:
    """A scope's pool in the order (layer, expert) and what calibration saw of it.

    ``contribution`` and ``gates`` are [P] float64: a_e and the sum of routing weights; ``distances`` gives [P, P].
    """

    pool: tuple[ExpertId, ...]
    contribution: Tensor
    gates: Tensor
    distances: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Decision:
    """The prototypes of a scope, sorted, and one record for every router slot of the pool, in the pool's order."""

    prototypes: tuple[ExpertId, ...]
    slots: tuple[SlotRecord, ...]
