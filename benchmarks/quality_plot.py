"""Rise of the loss against the bytes of prototypes, one line a method: a self-contained SVG for light and dark.

The y axis is logarithmic, since rises span two orders of magnitude. Names stand at the left end of
their lines, where these are furthest apart, moved apart until none covers another. Whiskers are the
lowest and the highest seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from xml.sax.saxutils import escape

from benchmarks.quality_report import OWN, Cell

WIDTH, HEIGHT = 900, 560
LEFT, RIGHT, TOP, BOTTOM = 64, 30, 60, 52
NAMES = 190
"""Width of the column of names, left of the smallest package."""
GAP = 15
_ROOM = 0.05
"""Left of the smallest and right of the largest, as a share of what lies between them."""
COLOURS = (
    ("#0969da", "#58a6ff"),
    ("#bf8700", "#e3b341"),
    ("#8250df", "#bc8cff"),
    ("#cf222e", "#ff7b72"),
    ("#1b7c83", "#39c5cf"),
    ("#bf3989", "#f778ba"),
    ("#57606a", "#9198a1"),
    ("#9a6700", "#d29922"),
)
SUBTITLE = (
    "rise of the held-out loss, nats a token (log); whiskers: lowest and highest calibration seed"
)
X_LABEL = "MB of prototypes"
DASHES = ("", "7 4", "2 3", "10 3 2 3")
_DROPPED = "+drop"


def plot(cells: Sequence[Cell], title: str) -> str:
    """The SVG's text."""
    lines = _lines([cell for cell in cells if cell.rise > 0])
    if not lines:
        return frame(title, SUBTITLE, X_LABEL, [])
    every = [point for points in lines.values() for point in points]
    scale = Scale.over([(p[0], p[2], p[3]) for p in every], LEFT + NAMES)
    x, y = scale.x, scale.y
    parts = axes(scale)
    ends = []
    others = [name for name in lines if name != OWN]
    for name in (*others, *(n for n in lines if n == OWN)):
        points = lines[name]
        number = others.index(name) if name in others else 0
        kind = "own" if name == OWN else f"c{number % len(COLOURS)}"
        dash = "" if name == OWN else DASHES[number // len(COLOURS) % len(DASHES)]
        drawn = f' stroke-dasharray="{dash}"' if dash else ""
        path = " ".join(f"{x(size):.1f},{y(rise):.1f}" for size, rise, _, _ in points)
        parts.append(f'<polyline class="line {kind}" points="{path}"{drawn}/>')
        for size, rise, least, most in points:
            at = x(size)
            if most > least:
                parts.append(
                    f'<line class="line thin {kind}" x1="{at:.1f}" x2="{at:.1f}" '
                    f'y1="{y(least):.1f}" y2="{y(most):.1f}"/>'
                )
            parts.append(f'<circle class="dot {kind}" cx="{at:.1f}" cy="{y(rise):.1f}" r="3.5"/>')
        ends.append((y(points[0][1]), x(points[0][0]), kind, name))
    return frame(title, SUBTITLE, X_LABEL, [*parts, *_names(ends)])


def _lines(cells: Sequence[Cell]) -> dict[str, list[tuple[float, float, float, float]]]:
    """Method -> (MB of prototypes, mean rise, lowest, highest), the smallest first.

    Every method in the scope in which it loses least; what differs in re-routing alone is drawn once, re-routed.
    """
    drawn = {cell.method for cell in cells if not cell.method.endswith(_DROPPED)}
    best = {method: _best_scope(cells, method) for method in drawn}
    grouped: dict[str, dict[float, list[Cell]]] = {}
    for cell in sorted(cells, key=lambda c: (c.method, c.rate, c.seed)):
        if best.get(cell.method) == cell.scope:
            name = cell.method if cell.scope == 1 else f"{cell.method}, scope {cell.scope}"
            grouped.setdefault(name, {}).setdefault(cell.rate, []).append(cell)
    return {
        name: sorted(
            (
                mean(c.prototype_bytes for c in rows) / 1e6,
                mean(c.rise for c in rows),
                min(c.rise for c in rows),
                max(c.rise for c in rows),
            )
            for rows in rates.values()
        )
        for name, rates in grouped.items()
    }


def _best_scope(cells: Sequence[Cell], method: str) -> int:
    """Where its mean over rates and seeds is least, ties to the smaller one."""
    rises: dict[int, list[float]] = {}
    for cell in cells:
        if cell.method == method:
            rises.setdefault(cell.scope, []).append(cell.rise)
    return min(rises, key=lambda scope: (mean(rises[scope]), scope))


@dataclass(frozen=True, slots=True)
class Scale:
    """Where values are in a picture: x linear with some room at both ends, y logarithmic over whole thirds of decades.

    Attributes:
        low, high: decimal logarithms at the bottom and at the top.
        low_x, high_x: smallest and largest x.
        left: where the x axis begins.
    """

    low: float
    high: float
    low_x: float
    high_x: float
    left: float

    @classmethod
    def over(cls, dots: Sequence[tuple[float, float, float]], left: float) -> Scale:
        """Around at least one dot: x, lowest and highest y, which are above 0."""
        sizes = [one[0] for one in dots]
        low = math.floor(3 * math.log10(min(one[1] for one in dots))) / 3
        high = math.ceil(3 * math.log10(max(one[2] for one in dots))) / 3
        return cls(low, high, min(sizes), max(sizes), left)

    def x(self, value: float) -> float:
        """Place of a size."""
        room = (self.high_x - self.low_x) * _ROOM or 1.0
        share = (value - self.low_x + room) / (self.high_x - self.low_x + 2 * room)
        return self.left + share * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        """Place of a loss."""
        share = (self.high - math.log10(value)) / ((self.high - self.low) or 1.0)
        return TOP + share * (HEIGHT - TOP - BOTTOM)


def axes(scale: Scale) -> list[str]:
    """Rails and figures."""
    low, high, low_x, high_x = scale.low, scale.high, scale.low_x, scale.high_x
    x, y = scale.x, scale.y
    parts = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 2, 5):
            value = factor * 10.0**power
            if not low - 1e-9 <= math.log10(value) <= high + 1e-9:
                continue
            parts.append(
                f'<line class="rail" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
                f'<text class="soft" x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
            )
    step = _step(high_x - low_x)
    tick = math.ceil(low_x / step) * step
    while tick <= high_x + 1e-9:
        parts.append(
            f'<line class="rail" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="soft" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
        tick += step
    return parts


def _step(width: float) -> float:
    """A round distance that gives four to eight marks."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width / 4))
    return next(factor * power for factor in (1, 2, 5, 10) if width / (factor * power) <= 8)


def _names(ends: Sequence[tuple[float, float, str, str]]) -> list[str]:
    """The names, from the top down, none nearer than ``GAP`` to the next; a hairline to each line's end."""
    ordered = sorted(ends)
    places: list[float] = []
    for at, *_ in ordered:
        places.append(max(at, places[-1] + GAP) if places else at)
    over = max(0.0, places[-1] - (HEIGHT - BOTTOM - 4)) if places else 0.0
    if over:  # push back up from the bottom
        places[-1] -= over
        for number in range(len(places) - 2, -1, -1):
            places[number] = min(places[number], places[number + 1] - GAP)
    parts = []
    right = LEFT + NAMES - 24
    for place, (at, begin, kind, name) in zip(places, ordered, strict=True):
        weight = ' font-weight="700"' if name == OWN else ""
        parts.append(
            f'<polyline class="hair {kind}" points="{right + 5},{place:.1f} {right + 22},{place:.1f} '
            f'{begin - 6:.1f},{at:.1f}"/>'
            f'<text class="name {kind}" x="{right}" y="{place + 4:.1f}" text-anchor="end"{weight}>{escape(name)}</text>'
        )
    return parts


def frame(
    title: str, subtitle: str, x_label: str, parts: Sequence[str], left: float = LEFT + NAMES
) -> str:
    """The whole picture around ``parts``; ``left`` is where the x axis begins."""

    def rules(side: int) -> str:
        own = ("#1a7f37", "#3fb950")[side]
        pairs = [("own", own), *((f"c{i}", COLOURS[i][side]) for i in range(len(COLOURS)))]
        return " ".join(f".{kind} {{ --c: {colour} }}" for kind, colour in pairs)

    style = f"""
  svg {{ font: 13px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif }}
  .ground {{ fill: #ffffff }} .text {{ fill: #1f2328 }} .soft {{ fill: #59636e }} .rail {{ stroke: #e4e8ec }}
  .line {{ fill: none; stroke: var(--c); stroke-width: 2 }} .thin {{ stroke-width: 1.2 }}
  .own.line {{ stroke-width: 3.5 }} .thin.own {{ stroke-width: 1.5 }}
  .hair {{ fill: none; stroke: var(--c); stroke-width: 0.7; opacity: 0.7 }}
  .dot, .name {{ fill: var(--c) }}
  {rules(0)}
  @media (prefers-color-scheme: dark) {{
    .ground {{ fill: #0d1117 }} .text {{ fill: #e6edf3 }} .soft {{ fill: #9198a1 }} .rail {{ stroke: #262c36 }}
    {rules(1)}
  }}
"""
    middle = left + (WIDTH - left - RIGHT) / 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
            f"<style>{style}</style>",
            f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
            f'<text class="text" x="24" y="30" font-size="17" font-weight="600">{escape(title)}</text>',
            f'<text class="soft" x="24" y="48">{escape(subtitle)}</text>',
            *parts,
            f'<text class="soft" x="{middle:.0f}" y="{HEIGHT - 14}" text-anchor="middle">'
            f"{escape(x_label)}</text>",
            "</svg>",
            "",
        ]
    )
