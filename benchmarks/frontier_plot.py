"""KL to the original against bits a weight: ours, and llama.cpp's types; a self-contained SVG.

One picture for the experts alone; the whole file is drawn where nothing else was measured. llama.cpp's types are dots
with their names, the line goes along those that no smaller one beats. Whiskers: lowest and highest seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.frontier_report import LLAMA, OURS, Point, curve
from benchmarks.picture import LEFT, Places, Scale, axes, dot, frame, line, words

KINDS = {OURS: "own", LLAMA: "peer"}
NAMES = {OURS: "conmoe-edge", LLAMA: "llama.cpp"}
X_LABELS = {
    "experts": "size of the experts (bits a weight of the original)",
    "whole": "size of the whole file (bits a weight of the original)",
}
Y_LABEL = "divergence from the original (KL, nats a token, log)"
TITLE = "What the same bytes lose: conmoe-edge and llama.cpp's types"
_Dot = tuple[float, float, float, float, str]
"""Bits, mean KL, lowest, highest, name."""


def plot(points: Sequence[Point], subtitle: str) -> str:
    """The SVG's text; ``subtitle`` says of which model and text."""
    parts = {point.part for point in points}
    part = "experts" if "experts" in parts or not parts else "whole"
    dots = {system: _dots(points, part, system) for system in (LLAMA, OURS)}
    every = [one for some in dots.values() for one in some]
    if not every:
        return frame(TITLE, subtitle, X_LABELS[part], Y_LABEL, [])
    scale = Scale.over([(d[0], d[2], d[3]) for d in every], LEFT)
    x, y = scale.x, scale.y
    drawn, places = axes(scale), Places(LEFT)
    best = {system: curve([d[:2] for d in some]) for system, some in dots.items()}
    ends = {system: [(x(a), y(b)) for a, b in some] for system, some in best.items()}
    for system, some in dots.items():
        places.path(ends[system])
        for one in some:
            places.dot(x(one[0]), y(one[1]))
    for system, some in dots.items():
        kind = KINDS[system]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in ends[system])
        drawn.append(f'<polyline class="line {kind}" points="{path}"/>')
        if some:  # the name of the whole line, in the middle of its last stretch
            last = ends[system][-2:]
            at, base, anchor = places.name(
                mean(a for a, _ in last), mean(b for _, b in last), NAMES[system]
            )
            drawn.append(words(f"name {kind}", at, base, NAMES[system], anchor, bold=True))
        for size, value, least, most, _ in some:
            if most > least:
                drawn.append(line(f"line thin {kind}", (x(size), y(least)), (x(size), y(most))))
            drawn.append(dot(kind, x(size), y(value)))
        if system == LLAMA:
            for size, value, _, _, name in sorted(some, key=lambda d: d[1]):
                at, base, anchor = places.name(x(size), y(value), name, 12)
                drawn.append(
                    words(f"name {kind}", at, base, name, anchor).replace(
                        "<text ", '<text font-size="12" ', 1
                    )
                )
    return frame(TITLE, subtitle, X_LABELS[part], Y_LABEL, drawn)


def _dots(points: Sequence[Point], part: str, system: str) -> list[_Dot]:
    grouped: dict[str, list[Point]] = {}
    for point in points:
        if (point.part, point.system) == (part, system) and point.kl > 0:
            grouped.setdefault(point.name, []).append(point)
    return [
        (
            mean(p.size for p in own),
            mean(p.kl for p in own),
            min(p.kl for p in own),
            max(p.kl for p in own),
            name,
        )
        for name, own in grouped.items()
    ]
