"""The share of requests that a cache of so many slots serves: the package's routing trace, replayed.

The same replay and the same policies as those that choose the cache settings (``offload/simulate/policy_search.py``):
quotas are fitted on the first half of the trace, hits counted on the second. One curve a record layout, since each
layout has a cache of its own. Peak memory: the trace. Deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.offload.residency.policies import tables
from conmoe_edge.offload.simulate.load_settings import prototype_trace
from conmoe_edge.offload.simulate.policy_search import choose
from conmoe_edge.plan.trace import RoutingTrace

POINTS = 10
_MOST_REQUESTS = 1 << 16  # of a replay; a longer trace gives some of its sequences


@dataclass(frozen=True, slots=True)
class HitCurve:
    """One record layout.

    Attributes:
        precision: of its records.
        prototypes: that have it.
        slots: ascending; the last is ``prototypes``.
        rates: policy -> share of the requests that found their prototype, one for every number of slots.
        planned: slots that the package was planned for, where that is known.
    """

    precision: str
    prototypes: int
    slots: tuple[int, ...]
    rates: dict[str, tuple[float, ...]]
    planned: int | None

    @property
    def best(self) -> tuple[float, ...]:
        """The best policy's rate, for every number of slots."""
        return tuple(max(column) for column in zip(*self.rates.values(), strict=True))


def hit_curves(
    trace: RoutingTrace,
    manifest: Manifest,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[HitCurve, ...]:
    """One curve a layout; ``tell(done, of)`` after every replay. Empty where there are no prototypes."""
    asked = sampled(trace, manifest)
    counts = [len(table.members) for table in tables(manifest)]
    planned = planned_slots(manifest)
    grids = [_grid(count, mark) for count, mark in zip(counts, planned, strict=True)]
    steps = max((len(grid) for grid in grids), default=0)
    found: list[dict[str, list[float]]] = [{} for _ in grids]
    for step in range(steps):
        # A layout with fewer points than another stays where every prototype has a slot.
        slots = [grid[min(step, len(grid) - 1)] if grid else 0 for grid in grids]
        for layout, settings in enumerate(choose(asked, manifest, slots)):
            if step < len(grids[layout]) - 1:
                for name, rate in settings.candidates.items():
                    found[layout].setdefault(name, []).append(rate)
        tell(step + 1, steps)
    return tuple(
        HitCurve(
            manifest.layouts[layout].precision,
            counts[layout],
            tuple(grid),
            # With a slot for every prototype all are there from the start.
            {name: (*rates, 1.0) for name, rates in found[layout].items()},
            planned[layout],
        )
        for layout, grid in enumerate(grids)
        if found[layout]
    )


def sampled(trace: RoutingTrace, manifest: Manifest):
    """The trace in prototype numbers, some sequences of it where it is long."""
    asked = prototype_trace(trace, manifest)
    return asked.every(-(-asked.requests // _MOST_REQUESTS) or 1)


def planned_slots(manifest: Manifest) -> list[int | None]:
    """Slots of every layout in the plan: those of the cache settings, or all where every prototype is resident."""
    counts = [len(table.members) for table in tables(manifest)]
    if manifest.cache:
        return [one.slots for one in manifest.cache]
    chosen = manifest.plan.get("chosen")
    known = chosen.get("slots") if isinstance(chosen, dict) else None
    return [count if known == sum(counts) else None for count in counts]


def _grid(count: int, planned: int | None) -> list[int]:
    """Even steps up to ``count``, with the planned number among them."""
    if count < 2:
        return [count] if count else []
    grid = {max(1, round(count * step / POINTS)) for step in range(1, POINTS + 1)}
    return sorted(grid | ({planned} if planned and planned < count else set()))
