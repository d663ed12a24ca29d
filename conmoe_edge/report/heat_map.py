"""Layer x router slot: shade is routing weight, shape is what became of the slot.

A row a layer, a cell a slot. Its own expert fills the cell, an alias is a band across its middle, a constant a line, a
dropped slot a dot: that reads without colour. Cells of wide models scroll sideways rather than vanish.
"""

from __future__ import annotations

from conmoe_edge.report.charts import chart, count_axis, rows_axis
from conmoe_edge.report.markup import Markup, figure, join, key, stretched, tag
from conmoe_edge.report.package_summary import PackageSummary
from conmoe_edge.report.slot_shares import Kind, SlotFact

_HIGH = 20.0
_SHAPES: dict[Kind, tuple[float, float]] = {  # top and height of 20
    "prototype": (1.0, 18.0),
    "alias": (6.5, 7.0),
    "constant": (8.5, 3.0),
    "dropped": (9.5, 1.0),
}
_WORDS: dict[Kind, str] = {
    "prototype": "its own expert",
    "alias": "another's expert",
    "constant": "a constant",
    "dropped": "nothing",
}
MOST_SHADE = 4.0
"""Equal shares from which on a cell is as strong as it gets."""


def heat_map(facts: PackageSummary) -> Markup:
    """The whole section."""
    counts = facts.counts()
    longest = max(len(row) for row in facts.slots.values())
    rows = [_row(layer, row, longest) for layer, row in facts.slots.items()]
    legend = [(_sample(kind, 1.5), _WORDS[kind]) for kind in _WORDS if counts[kind]]
    shades = [(_sample("prototype", one), word) for one, word in _SHADES] if facts.usage else []
    return figure(
        "What became of every router slot",
        tag("div", key("A cell is", *legend), key("Its share", *shades), class_="keys"),
        chart(
            "Router slots and the routing weight they had"
            if facts.usage is not None
            else "Router slots",
            join(*rows),
            across=count_axis("number of the router slot in its layer", longest),
            up=rows_axis("layer", [str(layer) for layer in facts.slots]),
            least=max(300, 60 + 5 * longest),
        ),
        lead=_lead(facts),
        tip="Point at a cell, or tap it.",
        id_="slots",
    )


_SHADES = (
    (0.0, "none"),
    (0.5, "half an equal one"),
    (1.0, "equal"),
    (2.0, "twice that"),
    (4.0, "four times or more"),
)


def describe(slot: SlotFact) -> str:
    """One slot in words."""
    parts = [f"slot {slot.id.layer}.{slot.id.expert}:"]
    if slot.kind == "prototype":
        parts.append("its own expert")
    elif slot.prototype is not None:
        parts.append(f"leads to {slot.prototype.layer}.{slot.prototype.expert}")
    else:
        parts.append("a constant" if slot.kind == "constant" else "nothing")
    if slot.scale != 1.0:
        parts.append(f"times {slot.scale:.3g}")
    if slot.constant and slot.prototype is not None:
        parts.append("plus a constant")
    said = " ".join(parts)
    if slot.share is not None:
        said += f"; {100 * slot.share:.2f} % of the weight"
        said += "" if slot.relative is None else f", {slot.relative:.2f} equal shares of its layer"
    if slot.kind == "alias" and slot.distance is not None:
        said += f"; distance {slot.distance:.3f}"
    return said


def shade(relative: float | None) -> float:
    """Opacity of a cell: the square root of the share, so that small ones can be told apart."""
    if relative is None:
        return 0.55
    return 0.1 + 0.9 * min(1.0, (relative / MOST_SHADE) ** 0.5)


def _row(layer: int, row: tuple[SlotFact, ...], longest: int) -> Markup:
    cells = [_cell(slot, number + 0.06, 0.88) for number, slot in enumerate(row)]
    return stretched(*cells, wide=longest, high=_HIGH, label=f"layer {layer}", class_="cells")


def _cell(slot: SlotFact, left: float, width: float) -> Markup:
    top, height = _SHAPES[slot.kind]
    shape = tag(
        "rect",
        x=left,
        y=top,
        width=width,
        height=height,
        class_=slot.kind,
        fill_opacity=round(shade(slot.relative), 2),
    )
    # The whole cell can be pointed at, not only the band in its middle.
    whole = tag("rect", x=left, y=0.0, width=width, height=_HIGH, class_="hit")
    return tag("g", tag("title", describe(slot)), shape, whole)


def _sample(kind: Kind, relative: float) -> Markup:
    top, height = _SHAPES[kind]
    box = tag(
        "rect", x=1.0, y=top, width=18.0, height=height, class_=kind, fill_opacity=shade(relative)
    )
    return tag(
        "svg",
        box,
        class_="sample",
        viewBox="0 0 20 20",
        aria_hidden="true",
    )


def _lead(facts: PackageSummary) -> str:
    counts = facts.counts()
    total = len(facts.every_slot)
    said = f"{counts['prototype']:,} of {total:,} router slots keep their own expert"
    if counts["alias"]:
        said += f", {counts['alias']:,} share another's"
    if counts["constant"]:
        said += f", {counts['constant']:,} became a constant"
    if counts["dropped"]:
        said += f", {counts['dropped']:,} were dropped"
    said += ". "
    scaled = sum(slot.scale != 1.0 for slot in facts.every_slot)
    added = sum(slot.constant and slot.prototype is not None for slot in facts.every_slot)
    if scaled:
        said += f"{scaled:,} scale what they get. "
    if added:
        said += f"{added:,} add a constant of their own. "
    if facts.usage is None:
        return said + "The package does not say how much each was used."
    if facts.usage.source == "trace":
        return (
            said + "The stronger a cell, the more often the router chose it in the package's trace."
        )
    return said + "The stronger a cell, the more routing weight it had in the original model."
