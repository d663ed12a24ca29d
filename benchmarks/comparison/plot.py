"""Tokens per second against the memory cap, one line per system, as one self-contained SVG.

The y axis is logarithmic; the caps are equally spaced, with "no cap" at the right. A system that ran
out of memory under a cap has no point there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from benchmarks.comparison.arms import SYSTEMS, cap_name
from benchmarks.comparison.report import Row

WIDTH, HEIGHT = 900, 480
LEFT, RIGHT, TOP, BOTTOM = 64, 330, 44, 56
COLOURS = {
    "ours": (
        "#1b6e3c",
        "#2f9e5b",
        "#57b894",
        "#0e7c86",
        "#3aa0c9",
        "#5b6fd6",
        "#8455c9",
        "#a3437f",
    ),
    "transformers": ("#666666",),
    "offload": ("#9a9a9a",),
    "llama": ("#b34700", "#d97706", "#e0a526", "#c2410c", "#92400e"),
}


def plot(rows: Sequence[Row], title: str) -> str:
    """The SVG's text; systems in the order of ``SYSTEMS``."""
    seen = [row for row in rows if row.speed]
    caps = sorted({row.cap for row in seen}, key=lambda cap: (cap is None, cap or 0))
    if not seen:
        return _frame(title, [])
    low = math.floor(math.log10(min(row.speed or 1.0 for row in seen)))
    high = math.ceil(math.log10(max(row.speed or 1.0 for row in seen)))
    high = max(high, low + 1)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(caps) - 1)

    def x(cap: int | None) -> float:
        return LEFT + 12 + (step - 24 / max(1, len(caps) - 1)) * caps.index(cap)

    def y(speed: float) -> float:
        share = (math.log10(speed) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = _grid(low, high, y)
    for cap in caps:
        label = "no cap" if cap is None else cap_name(cap).replace("GiB", " GiB")
        parts.append(
            f'<text x="{x(cap):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{label}</text>'
        )
    used: dict[str, int] = {}
    legend = []
    for system in SYSTEMS.values():
        points = sorted(
            (x(row.cap), y(row.speed)) for row in seen if row.system == system.key and row.speed
        )
        if not points:
            continue
        palette = COLOURS[system.engine]
        number = used.get(system.engine, 0)
        used[system.engine] = number + 1
        colour = palette[number % len(palette)]
        dash = "" if system.engine == "ours" else ' stroke-dasharray="6 4"'
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in points]
        legend.append((points[-1][1], colour, system.label))
    return _frame(title, [*parts, *_legend(legend)])


def _grid(low: int, high: int, y: Callable[[float], float]) -> list[str]:
    parts = []
    for power in range(low, high + 1):
        for factor in (1, 2, 5) if power < high else (1,):
            speed = factor * 10.0**power
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(speed):.1f}" y2="{y(speed):.1f}" '
                f'stroke="#ddd"/><text x="{LEFT - 8}" y="{y(speed) + 4:.1f}" '
                f'text-anchor="end">{speed:g}</text>'
            )
    return parts


def _legend(entries: Sequence[tuple[float, str, str]]) -> list[str]:
    """Names at the right, fastest on top."""
    parts = []
    for number, (_, colour, label) in enumerate(sorted(entries)):
        top = TOP + 8 + 18 * number
        parts.append(
            f'<rect x="{WIDTH - RIGHT + 22}" y="{top - 8}" width="12" height="8" fill="{colour}"/>'
            f'<text x="{WIDTH - RIGHT + 40}" y="{top}">{escape(label)}</text>'
        )
    return parts


def _frame(title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
            *parts,
            f'<text x="{LEFT + (WIDTH - LEFT - RIGHT) / 2:.0f}" y="{HEIGHT - 12}" '
            'text-anchor="middle">memory cap, page cache included</text>',
            f'<text transform="translate(16 {HEIGHT / 2:.0f}) rotate(-90)" '
            'text-anchor="middle">tokens per second</text>',
            "</svg>",
            "",
        ]
    )
