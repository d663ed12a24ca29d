"""The share of requests that a cache of so many bytes serves: the package's routing trace, replayed.

The same replay and the same policies as those that choose the cache settings (``offload/simulate/policy_search.py``):
quotas are fitted on the first half of the trace, hits counted on the second. Each record layout has a cache of its own,
so there is a curve for each; and one for all of them together, with the same share of slots everywhere, as the runtime
divides its memory. Peak memory: the trace. Deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.offload.residency.policies import tables
from conmoe_edge.offload.simulate.load_settings import prototype_trace
from conmoe_edge.offload.simulate.policy_search import choose
from conmoe_edge.plan.trace import PrototypeTrace, RoutingTrace

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


@dataclass(frozen=True, slots=True)
class CacheCurve:
    """All record layouts together.

    Attributes:
        slots: of all layouts, ascending; the last is one for each prototype.
        nbytes: that these slots take.
        rates: policy -> share of the requests that found their prototype, one for every number of slots.
        best: the same where each layout has the policy that is best for it.
        planned: slots that the package was planned for, where that is known.
    """

    slots: tuple[int, ...]
    nbytes: tuple[int, ...]
    rates: dict[str, tuple[float, ...]]
    best: tuple[float, ...]
    planned: int | None


@dataclass(frozen=True, slots=True)
class Hits:
    """What the replays gave: for every layout, and for all of them."""

    layouts: tuple[HitCurve, ...]
    all_together: CacheCurve


def hit_curves(
    trace: RoutingTrace,
    manifest: Manifest,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Hits | None:
    """The curves; ``tell(done, of)`` after every replay. ``None`` where there is nothing to be replayed."""
    asked = sampled(trace, manifest)
    counts = [len(table.members) for table in tables(manifest)]
    planned = planned_slots(manifest)
    grid = _grid(counts, planned)
    if len(grid) < 2:
        return None
    found: list[dict[int, dict[str, float]]] = [{} for _ in counts]
    for step, slots in enumerate(grid):
        chosen = choose(asked, manifest, slots)  # empty where every prototype has a slot
        for layout, settings in enumerate(chosen):
            if settings.candidates:
                found[layout][slots[layout]] = settings.candidates
        tell(step + 1, len(grid))
    names = list(dict.fromkeys(name for one in found for rates in one.values() for name in rates))
    if not names:
        return None

    def rate(layout: int, slots: int, name: str) -> float:
        # With a slot for every prototype all are there from the start; what nobody asks for misses nothing.
        return found[layout][slots][name] if slots in found[layout] else 1.0

    requests = _requests(asked, manifest)
    total = sum(requests) or 1

    def overall(slots: tuple[int, ...], rates: Callable[[int, int], float]) -> float:
        return (
            sum(asks * rates(layout, slots[layout]) for layout, asks in enumerate(requests)) / total
        )

    def best(layout: int, slots: int) -> float:
        return max(rate(layout, slots, name) for name in names)

    curves = []
    for layout, count in enumerate(counts):
        steps = [*sorted(found[layout]), count]
        if len(steps) > 1:
            curves.append(
                HitCurve(
                    manifest.layouts[layout].precision,
                    count,
                    tuple(steps),
                    {name: tuple(rate(layout, s, name) for s in steps) for name in names},
                    planned[layout],
                )
            )
    sizes = [layout.nbytes for layout in manifest.layouts]
    marks = [one for one in planned if one is not None]
    together = CacheCurve(
        tuple(map(sum, grid)),
        tuple(sum(n * size for n, size in zip(slots, sizes, strict=True)) for slots in grid),
        {
            name: tuple(
                overall(slots, lambda at, n, name=name: rate(at, n, name)) for slots in grid
            )
            for name in names
        },
        tuple(overall(slots, best) for slots in grid),
        sum(marks) if len(marks) == len(planned) else None,
    )
    return Hits(tuple(curves), together)


def _requests(asked: PrototypeTrace, manifest: Manifest) -> list[int]:
    """Of every layout, in the half of the trace that is counted."""
    found = [0] * len(manifest.layouts)
    for layer in asked.asked:
        for row in layer[asked.tokens // 2 :]:
            for number in row:
                found[manifest.prototypes[number].layout] += 1
    return found


def sampled(trace: RoutingTrace, manifest: Manifest) -> PrototypeTrace:
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


def _grid(counts: Sequence[int], planned: Sequence[int | None]) -> list[tuple[int, ...]]:
    """Slots of every layout: even steps up to one for each prototype, with the planned ones among them."""
    steps = {
        tuple(min(count, max(1, round(count * step / POINTS))) for count in counts)
        for step in range(1, POINTS + 1)
    }
    marks = tuple(one for one in planned if one is not None)
    if len(marks) == len(counts) and all(marks):
        steps.add(tuple(min(one, count) for one, count in zip(marks, counts, strict=True)))
    return sorted(steps, key=lambda slots: (sum(slots), slots)) if sum(counts) else []
