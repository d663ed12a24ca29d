"""A picture with what it needs to be read: a title of its own, and two axes with names, units and figures.

The picture is SVG that stretches; all text stands beside it as HTML, so that nothing shrinks or overlaps on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from conmoe_edge.report.markup import Markup, tag
from conmoe_edge.units import unit_for


@dataclass(frozen=True, slots=True)
class Axis:
    """What is along one side.

    Attributes:
        name: with its unit: ``hits (% of requests)``.
        ticks: (place, label); places are shares of the length, from the left or from the bottom.
    """

    name: str
    ticks: tuple[tuple[float, str], ...] = ()


def chart(
    title: str, picture: str, *, across: Axis, up: Axis, note: str = "", least: int = 0
) -> Markup:
    """The whole chart. ``note`` explains it; ``least``: pixels of width below which it scrolls sideways."""
    plot = tag(
        "div",
        tag("span", up.name, class_="upname"),
        tag("div", *_marks(up, "bottom"), class_="up"),
        tag("div", picture, class_="canvas"),
        ticks(across),
        tag("span", across.name, class_="acrossname"),
        class_="plot",
        style=f"min-width:{least}px" if least else None,
    )
    if not least:
        return framed(title, plot, note=note)
    return framed(
        title, tag("div", plot, class_="scroll", tabindex="0", aria_label=title), note=note
    )


def framed(title: str, *body: str, note: str = "") -> Markup:
    """A chart with a body of its own, which names its axes in elements of the classes ``upname`` and ``acrossname``."""
    head: list[str] = [tag("figcaption", title)]
    if note:
        head.append(tag("p", note, class_="note"))
    return tag("figure", *head, *body, class_="chart")


def ticks(across: Axis) -> Markup:
    """The figures below a picture."""
    return tag("div", *_marks(across, "left"), class_="across")


def rows_axis(name: str, labels: Sequence[str]) -> Axis:
    """Names of rows of one height, the first at the top; some of them where there are very many."""
    count = len(labels)
    step = next(step for step in (1, 2, 4, 8, 16, 32, 1 << 20) if count / step <= 64)
    marks = [(1 - (n + 0.5) / count, label) for n, label in enumerate(labels) if not n % step]
    return Axis(name, tuple(marks))


def number_axis(name: str, most: float, least: float = 0.0) -> Axis:
    """Round figures between ``least`` and ``most``, three to six of them."""
    width = (most - least) or 1.0
    step, digits = round_step(width)
    first = math.ceil(least / step - 1e-9)
    figures = [step * n for n in range(first, math.floor(most / step + 1e-9) + 1)]
    return Axis(name, tuple(((f - least) / width, f"{f:,.{digits}f}") for f in figures))


def round_step(width: float) -> tuple[float, int]:
    """Between round figures of which three to six fit into ``width``, and the digits behind their points."""
    power = 10.0 ** math.floor(math.log10(width / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if width / (factor * power) <= 5)
    return step, max(0, -math.floor(math.log10(step) + 1e-9))


def count_axis(name: str, count: int) -> Axis:
    """Numbers of things that stand one beside the other, the middle of each: 0, 8, 16 ..., at most nine of them."""
    step = next(
        step for power in range(12) for step in (8 << power, 12 << power) if count / step <= 8
    )
    marks = [((n + 0.5) / count, f"{n:,}") for n in range(0, count, step)]
    return Axis(name, tuple(marks))


def size_axis(name: str, most: float) -> Axis:
    """Bytes from 0 to ``most``, all in the unit of the largest; its name goes behind ``name``."""
    unit = unit_for(most)
    return number_axis(f"{name} ({unit.name})", most / unit.nbytes)


def _marks(axis: Axis, side: str) -> list[Markup]:
    return [tag("span", label, style=f"{side}:{100 * place:.2f}%") for place, label in axis.ticks]
