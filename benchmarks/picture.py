"""What the drawings of results share: a frame with a title and named axes, a scale, and places for names.

Every drawing is one self-contained SVG for light and dark ground, narrow enough that its text can be read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 460
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 92, 58
FONT = 14
LETTER = 0.6
"""Mean width of a letter of a wide sans serif, in units of the font's size."""
_ROOM = 0.05
"""Left of the smallest and right of the largest, as a share of what lies between them."""
_COLOURS = {
    "own": ("#1a7f37", "#3fb950"),
    "peer": ("#b34700", "#f0883e"),
    "other": ("#8c959f", "#6e7681"),
}


def text_width(text: str, size: float = FONT) -> float:
    """How wide a text is, about."""
    return LETTER * size * len(text)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle that something covers."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two cover a common place."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


@dataclass(slots=True)
class Places:
    """What is taken of a picture, and where a name still has room, between ``left`` and the right edge."""

    left: float = 0.0
    taken: list[Box] = field(default_factory=lambda: [Box(0, 0, WIDTH, TOP - 8)])

    def dot(self, x: float, y: float) -> None:
        """Take what a dot covers."""
        self.taken.append(Box(x - 5, y - 5, x + 5, y + 5))

    def path(self, points: Sequence[tuple[float, float]]) -> None:
        """Take what a line covers."""
        for (x0, y0), (x1, y1) in pairwise(points):
            steps = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / 4))
            for n in range(steps + 1):
                x, y = x0 + (x1 - x0) * n / steps, y0 + (y1 - y0) * n / steps
                self.taken.append(Box(x - 1.5, y - 1.5, x + 1.5, y + 1.5))

    def name(self, x: float, y: float, text: str, size: float = FONT) -> tuple[float, float, str]:
        """(x, y, anchor) of a name beside a dot: the first side where it covers nothing, else the first of all."""
        width = text_width(text, size)
        sides = [
            *((x + 8, y - 6, "start"), (x + 8, y + 4, "start"), (x - 8, y + 4, "end")),
            *((x - 8, y + 15, "end"), (x + 8, y + 15, "start"), (x - 8, y - 6, "end")),
            *((x + 8, y + 1, "start"), (x + 8, y - 3, "start"), (x + 8, y - 14, "start")),
            *((x + 16, y - 2, "start"), (x, y - 10, "middle"), (x, y + 20, "middle")),
        ]
        boxes = [_box(at, base, anchor, width, size) for at, base, anchor in sides]
        free = [
            n
            for n, box in enumerate(boxes)
            if box.left >= self.left
            and box.right <= WIDTH - 6
            and not any(map(box.meets, self.taken))
        ]
        chosen = free[0] if free else 0
        self.taken.append(boxes[chosen])
        return sides[chosen]


def _box(x: float, base: float, anchor: str, width: float, size: float) -> Box:
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return Box(left, base - 0.8 * size, left + width, base + 0.15 * size)


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
            parts.append(line("rail", (LEFT, y(value)), (WIDTH - RIGHT, y(value))))
            parts.append(words("soft", LEFT - 8, y(value) + 5, f"{value:g}", "end"))
    step = _step(high_x - low_x)
    tick = math.ceil(low_x / step) * step
    while tick <= high_x + 1e-9:
        parts.append(line("rail", (x(tick), TOP), (x(tick), HEIGHT - BOTTOM)))
        parts.append(words("soft", x(tick), HEIGHT - BOTTOM + 19, f"{tick:g}", "middle"))
        tick += step
    return parts


def _step(width: float) -> float:
    """A round distance that gives four to eight marks."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width / 4))
    return next(factor * power for factor in (1, 2, 5, 10) if width / (factor * power) <= 8)


def line(kind: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    """A straight line of a class."""
    return (
        f'<line class="{kind}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" '
        f'x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
    )


def dot(kind: str, x: float, y: float) -> str:
    """A dot of a class."""
    return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def words(
    kind: str, x: float, y: float, text: str, anchor: str = "start", *, bold: bool = False
) -> str:
    """A text of a class."""
    weight = ' font-weight="700"' if bold else ""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>'
        f"{escape(text)}</text>"
    )


def frame(
    title: str,
    subtitle: str,
    x_label: str,
    y_label: str,
    parts: Sequence[str],
    left: float = LEFT,
    height: float = HEIGHT,
) -> str:
    """The whole picture around ``parts``; ``left`` is where the x axis begins."""

    def rules(side: int) -> str:
        return " ".join(f".{kind} {{ --c: {both[side]} }}" for kind, both in _COLOURS.items())

    style = f"""
  svg {{ font: {FONT}px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif }}
  .ground {{ fill: #ffffff }} .text {{ fill: #1f2328 }} .soft {{ fill: #59636e }} .rail {{ stroke: #e4e8ec }}
  .line {{ fill: none; stroke: var(--c); stroke-width: 1.6 }} .thin {{ stroke-width: 1.2 }}
  .own.line {{ stroke-width: 3.5 }} .thin.own {{ stroke-width: 1.5 }}
  .hair {{ fill: none; stroke: var(--c); stroke-width: 0.7; opacity: 0.7 }}
  .dot, .name {{ fill: var(--c) }} .name.other {{ fill: #59636e }}
  {rules(0)}
  @media (prefers-color-scheme: dark) {{
    .ground {{ fill: #0d1117 }} .text {{ fill: #e6edf3 }} .soft {{ fill: #9198a1 }} .rail {{ stroke: #262c36 }}
    .name.other {{ fill: #9198a1 }}
    {rules(1)}
  }}
"""
    middle = left + (WIDTH - left - RIGHT) / 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
            f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">',
            f"<style>{style}</style>",
            f'<rect class="ground" width="{WIDTH}" height="{height:.0f}" rx="8"/>',
            f'<text class="text title" x="16" y="28" font-size="17" font-weight="600">{escape(title)}</text>',
            words("soft subtitle", 16, 49, subtitle),
            *([words("soft y-axis", 16, TOP - 14, y_label)] if y_label else []),
            *parts,
            words("soft x-axis", middle, height - 14, x_label, "middle"),
            "</svg>",
            "",
        ]
    )
