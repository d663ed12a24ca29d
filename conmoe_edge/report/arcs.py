"""Who stands in for whom: one arc for every alias, from its slot to its prototype, within each scope.

A panel a scope, its router slots in a row. Prototypes have a tick; the stronger an arc, the farther apart the two
experts were, in steps of the package's own distances.
"""

from __future__ import annotations

from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.report.charts import Axis, framed, ticks
from conmoe_edge.report.heat_map import describe
from conmoe_edge.report.markup import Markup, figure, stretched, tag
from conmoe_edge.report.package_summary import PackageSummary
from conmoe_edge.report.slot_shares import SlotFact

_HIGH = 100.0
_BASE = 92.0
_STEPS = 4


def arcs(facts: PackageSummary) -> Markup:
    """The whole section; nothing where no slot leads elsewhere."""
    if not facts.counts()["alias"]:
        return Markup("")
    shared = [layers for layers in facts.scopes if _aliases(facts, layers)]
    panels = [_panel(facts, layers) for layers in shared]
    lead = "An arc leads from a router slot to the expert that now answers for it; ticks are prototypes. "
    none = sum(map(len, facts.scopes)) - sum(map(len, shared))
    if none:
        lead += f"{none:,} layer{'' if none == 1 else 's'} without any {'is' if none == 1 else 'are'} left out. "
    distances = facts.distances
    if distances:
        lead += (
            f"Distances between the pretrained weights {_range(distances)}: "
            "0 would be the same expert, 1.414 two unrelated ones of one size. The stronger an arc, the farther it is."
        )
    return figure(
        "Who stands in for whom",
        tag("div", *panels, class_="panels"),
        lead=lead,
        tip="Point at an arc, or tap it.",
        id_="arcs",
    )


def _panel(facts: PackageSummary, layers: tuple[int, ...]) -> Markup:
    place: dict[ExpertId, float] = {}
    starts: list[tuple[int, int]] = []
    for layer in layers:
        start = len(place)
        starts.append((layer, start))
        place.update({slot.id: start + n + 0.5 for n, slot in enumerate(facts.slots[layer])})
    count = len(place)
    own = {one.id for one in facts.prototypes}
    shapes = [
        tag("path", d=f"M{at:g} {_BASE:g}V{_HIGH:g}", class_="tick" if one in own else "tick gone")
        for one, at in place.items()
    ]
    shapes += [
        tag("path", d=f"M{start} 0V{_HIGH:g}", class_="border") for _, start in starts if start
    ]
    aliases = _aliases(facts, layers)
    # The longest lie below, where they can still be pointed at beside the short ones.
    for slot in sorted(
        aliases, key=lambda s: (-abs(_ends(s, place)[0] - _ends(s, place)[1]), s.id)
    ):
        shapes.append(_arc(slot, _ends(slot, place), count, facts.distances))
    names = tuple(
        ((start + len(facts.slots[layer]) / 2) / count, f"layer {layer}") for layer, start in starts
    )
    title = f"Layer{'' if len(layers) == 1 else 's'} {_span(layers)}"
    return tag(
        "div",
        framed(
            title,
            stretched(*shapes, wide=count, high=_HIGH, label=title, class_="arcs"),
            ticks(Axis("", names)) if len(layers) > 1 else Markup(""),
            tag("span", "router slots, in their order", class_="acrossname"),
        ),
        class_="panel",
    )


def _range(distances: tuple[float, ...]) -> str:
    low, high = f"{distances[0]:.3f}", f"{distances[-1]:.3f}"
    return f"are {low}" if low == high else f"go from {low} to {high}"


def _aliases(facts: PackageSummary, layers: tuple[int, ...]) -> list[SlotFact]:
    """The slots of these layers that lead to another's expert."""
    return [slot for layer in layers for slot in facts.slots[layer] if slot.kind == "alias"]


def _ends(slot: SlotFact, place: dict[ExpertId, float]) -> tuple[float, float]:
    assert slot.prototype is not None
    return place[slot.id], place[slot.prototype]


def _arc(
    slot: SlotFact, ends: tuple[float, float], count: int, distances: tuple[float, ...]
) -> Markup:
    here, there = ends
    # A cubic reaches three quarters of the way to its control points.
    rise = (_BASE - 4) * (0.25 + 0.75 * abs(here - there) / max(1, count - 1)) / 0.75
    top = _BASE - min(rise, _BASE / 0.75 - 3)
    line = f"M{here:g} {_BASE:g}C{here:g} {top:.2f} {there:g} {top:.2f} {there:g} {_BASE:g}"
    step = _step(slot.distance, distances)
    return tag(
        "g",
        tag("title", describe(slot)),
        tag("path", d=line, class_="hit"),
        tag("path", d=line, class_=f"line d{step}"),
        class_="arc",
    )


def _step(distance: float | None, distances: tuple[float, ...]) -> int:
    """Which quarter of the package's distances it lies in."""
    if distance is None or len(distances) < 2:
        return 1
    below = sum(one < distance for one in distances)
    return min(_STEPS - 1, below * _STEPS // len(distances))


def _span(layers: tuple[int, ...]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
