"""Tokens per second of every system, a block for each memory cap, as one self-contained SVG.

A row a system with its name and figure, the fastest of a block first; the axis is logarithmic. No lines:
systems and caps are no scale. A system that ran out of memory under a cap has no row there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.comparison.arms import SYSTEMS, System, cap_name
from benchmarks.comparison.report import Row
from benchmarks.picture import RIGHT, WIDTH, dot, frame, line, words

TOP, ROW, HEAD, BOTTOM = 78, 21, 34, 58
NAMES = 330
"""Where the axis begins: right of the names."""
FIGURES = 46
"""Width of the figures at the right."""
TITLE = "Tokens a second of conmoe-edge, llama.cpp and transformers"
X_LABEL = "tokens a second (log)"
KINDS = {"ours": "own", "llama": "peer", "transformers": "other", "offload": "other"}


def plot(rows: Sequence[Row], subtitle: str) -> str:
    """The SVG's text; ``subtitle`` says of which model, on what."""
    seen = [row for row in rows if row.speed]
    caps = sorted({row.cap for row in seen}, key=lambda cap: (cap is None, cap or 0))
    if not seen:
        return frame(TITLE, subtitle, X_LABEL, "", [])
    low = math.floor(math.log10(min(row.speed or 1.0 for row in seen)))
    high = max(low + 1, math.ceil(2 * math.log10(max(row.speed or 1.0 for row in seen))) / 2)
    begin, end = float(NAMES), float(WIDTH - RIGHT - FIGURES)

    def x(speed: float) -> float:
        return begin + (math.log10(speed) - low) / (high - low) * (end - begin)

    height = TOP + len(caps) * HEAD + len(seen) * ROW + BOTTOM
    foot = height - BOTTOM
    parts = _grid(low, high, x, foot)
    y = float(TOP)
    for cap in caps:
        y += HEAD
        parts.append(words("text", 16, y - 9, _cap_words(cap), bold=True))
        for row in sorted((r for r in seen if r.cap == cap), key=lambda r: -(r.speed or 0.0)):
            system = SYSTEMS[row.system]
            kind = KINDS[system.engine]
            at, middle = x(row.speed or 1.0), y + ROW / 2
            parts.append(words(f"name {kind}", 16, middle + 5, _name(system)))
            if row.lowest and row.highest and row.highest > row.lowest:
                ends = (x(row.lowest), middle), (x(row.highest), middle)
                parts.append(line(f"line thin {kind}", *ends))
            parts.append(dot(kind, at, middle))
            parts.append(words("text", WIDTH - RIGHT, middle + 5, _figure(row.speed or 0.0), "end"))
            y += ROW
    return frame(TITLE, subtitle, X_LABEL, "", parts, begin, height)


def _grid(low: int, high: float, x, foot: float) -> list[str]:
    parts = []
    for power in range(low, math.ceil(high) + 1):
        for factor in (1, 3):
            speed = factor * 10.0**power
            if math.log10(speed) <= high + 1e-9:
                parts.append(line("rail", (x(speed), TOP), (x(speed), foot)))
                parts.append(words("soft", x(speed), foot + 19, f"{speed:g}", "middle"))
    return parts


def _cap_words(cap: int | None) -> str:
    if cap is None:
        return "Without a limit of memory"
    return f"Within {cap_name(cap).replace('GiB', ' GiB')}, page cache included"


def _name(system: System) -> str:
    name = system.label.replace("rate 0 %", "every expert")
    for share, said in (("50", "half removed"), ("25", "a quarter removed")):
        name = name.replace(f"rate {share} %", said)
    return name.replace(", CPU and disk offload", ", disk offload")


def _figure(speed: float) -> str:
    return f"{speed:.2f}" if speed < 1 else f"{speed:.1f}"
