"""KL to the original against bits a weight: ours, and the better of llama.cpp's types; a self-contained SVG.

One picture for the experts alone; the whole file is drawn where nothing else was measured. llama.cpp's types are dots
with their names, the line goes along those that no smaller one beats. Whiskers: lowest and highest seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from xml.sax.saxutils import escape

from benchmarks.frontier_report import LLAMA, OURS, Point, curve
from benchmarks.quality_plot import LEFT, Scale, axes, frame

KINDS = {OURS: "own", LLAMA: "c3"}
SUBTITLE = {
    "experts": "KL to the original on held-out text, nats a token (log); experts only, the rest untouched",
    "whole": "KL to the original on held-out text, nats a token (log); the whole file",
}
X_LABEL = "bytes x 8 over the original's weights (bits a weight)"
_Dot = tuple[float, float, float, float, str]
"""Bits, mean KL, lowest, highest, name."""


def plot(points: Sequence[Point], title: str) -> str:
    """The SVG's text."""
    parts = {point.part for point in points}
    part = "experts" if "experts" in parts or not parts else "whole"
    dots = {system: _dots(points, part, system) for system in (LLAMA, OURS)}
    every = [dot for some in dots.values() for dot in some]
    if not every:
        return frame(title, SUBTITLE[part], X_LABEL, [], LEFT)
    scale = Scale.over([(d[0], d[2], d[3]) for d in every], LEFT)
    x, y = scale.x, scale.y
    drawn = axes(scale)
    for system, some in dots.items():
        kind = KINDS[system]
        line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in curve([d[:2] for d in some]))
        drawn.append(f'<polyline class="line {kind}" points="{line}"/>')
        for size, value, least, most, name in some:
            at = x(size)
            if most > least:
                drawn.append(
                    f'<line class="line thin {kind}" x1="{at:.1f}" x2="{at:.1f}" '
                    f'y1="{y(least):.1f}" y2="{y(most):.1f}"/>'
                )
            drawn.append(f'<circle class="dot {kind}" cx="{at:.1f}" cy="{y(value):.1f}" r="3.5"/>')
            if system == LLAMA:
                drawn.append(
                    f'<text class="name {kind}" font-size="11" x="{at + 6:.1f}" '
                    f'y="{y(value) - 5:.1f}">{escape(name)}</text>'
                )
        if some:
            size, value, *_ = max(some, key=lambda d: d[1])
            side = -10 if system == OURS else 16
            anchor = "end" if system == OURS else "start"
            drawn.append(
                f'<text class="name {kind}" font-weight="700" x="{x(size) + side:.1f}" '
                f'y="{y(value) + 20:.1f}" text-anchor="{anchor}">{"conmoe-edge" if system == OURS else system}</text>'
            )
    return frame(title, SUBTITLE[part], X_LABEL, drawn, LEFT)


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
