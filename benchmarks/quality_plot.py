"""Rise of the loss against the bytes of prototypes, one line a method: a self-contained SVG for light and dark.

This project's method is drawn in colour, the others in grey, each with its name. The y axis is logarithmic, since rises
span two orders of magnitude. Names stand at the left end of their lines, where these are furthest apart, moved apart
until none covers another. Whiskers are the lowest and the highest seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.picture import BOTTOM, HEIGHT, LEFT, Scale, axes, dot, frame, line, words
from benchmarks.quality_report import OWN, Cell

NAMES = 176
"""Width of the column of names, left of the smallest package."""
GAP = 18
TITLE = "What {} loses beside other methods, at the same bytes"
X_LABEL = "size of the prototypes (MB)"
Y_LABEL = "rise of the held-out loss (nats a token, log)"
_DROPPED = "+drop"


def plot(cells: Sequence[Cell], subtitle: str) -> str:
    """The SVG's text; ``subtitle`` says of which model and what whiskers are."""
    title = TITLE.format(OWN)
    lines = _lines([cell for cell in cells if cell.rise > 0])
    if not lines:
        return frame(title, subtitle, X_LABEL, Y_LABEL, [], LEFT + NAMES)
    every = [point for points in lines.values() for point in points]
    scale = Scale.over([(p[0], p[2], p[3]) for p in every], LEFT + NAMES)
    x, y = scale.x, scale.y
    parts = axes(scale)
    ends = []
    others = [name for name in lines if name != OWN]
    for name in (*others, *(n for n in lines if n == OWN)):
        points, kind = lines[name], "own" if name == OWN else "other"
        path = " ".join(f"{x(size):.1f},{y(rise):.1f}" for size, rise, _, _ in points)
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        for size, rise, least, most in points:
            if most > least:
                parts.append(line(f"line thin {kind}", (x(size), y(least)), (x(size), y(most))))
            parts.append(dot(kind, x(size), y(rise)))
        ends.append((y(points[0][1]), x(points[0][0]), kind, name))
    return frame(title, subtitle, X_LABEL, Y_LABEL, [*parts, *_names(ends)], LEFT + NAMES)


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
        parts.append(
            f'<polyline class="hair {kind}" points="{right + 5},{place:.1f} {right + 22},{place:.1f} '
            f'{begin - 6:.1f},{at:.1f}"/>'
        )
        parts.append(words(f"name {kind}", right, place + 5, name, "end", bold=name == OWN))
    return parts
