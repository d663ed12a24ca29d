"""The report of ``bench`` as one picture: an SVG file that needs nothing beside it (no fonts, no
scripts), on light and on dark ground, narrow enough to be read on a phone.

Up to three blocks under one another, each with an axis of its own: the speed beside what this machine allows, where the
bytes of a token come from, and what the time of a token goes into. What was not measured or is nothing has no bar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from conmoe_edge.api.bench_report import BenchReport, PhaseReport
from conmoe_edge.cli.views.bench_table import (
    machine_line,
    number,
    package_line,
    percent_text,
    runtime_line,
)
from conmoe_edge.report.charts import round_step
from conmoe_edge.units import human_size, unit_for

_WIDTH, _MARGIN = 480, 20
_BAR, _ROW, _LINE = 18, 48, 19
_LETTER = 7.6
"""Pixels of a letter, about: where lines are broken."""
_STYLE = """
  svg { font: 13px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif }
  .ground { fill: #ffffff } .text { fill: #1f2328 } .soft { fill: #59636e }
  .head { font-weight: 600 } .title { font-size: 17px; font-weight: 600 }
  .rail { fill: #eaeef2 } .tick { stroke: #8c959f; stroke-width: 1 }
  .done { fill: #0969da } .memory { fill: #54a3ff } .host { fill: #bf8700 } .disk { fill: #cf4a22 }
  .compute { fill: #1a7f37 } .wait { fill: #cf4a22 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } .text { fill: #e6edf3 } .soft { fill: #9198a1 }
    .rail { fill: #262c36 } .tick { stroke: #6e7681 }
    .done { fill: #4493f8 } .memory { fill: #79c0ff } .host { fill: #d29922 } .disk { fill: #f0653b }
    .compute { fill: #3fb950 } .wait { fill: #f0653b }
  }
"""
_ANSWER, _PROMPT = "writing an answer", "reading the prompt"
_TIERS = {"memory": "from memory", "host": "from RAM", "disk": "from the disk"}


@dataclass(frozen=True, slots=True)
class _Row:
    """One bar: what it is of, its figure, and pieces of (class, length); without pieces it is a line of text."""

    label: str
    figure: str
    pieces: tuple[tuple[str, float], ...] = ()

    @property
    def total(self) -> float:
        return sum(length for _, length in self.pieces)


@dataclass(frozen=True, slots=True)
class _Block:
    """Bars over one axis, which goes to ``full``; ``ticks`` are (value, label)."""

    head: str
    rows: tuple[_Row, ...]
    axis: str
    full: float
    ticks: tuple[tuple[float, str], ...]
    legend: tuple[tuple[str, str], ...] = ()


def bench_svg(report: BenchReport) -> str:
    """The whole file."""
    body: list[str] = []
    y = 32
    speed = f"{number(report.decode.tokens_per_second.median)} tokens a second"
    body.append(_text(_MARGIN, y, f"conmoe-edge bench: {speed}", "text title"))
    for whole in (package_line(report), machine_line(report), runtime_line(report)):
        for line in _broken(whole):
            y += _LINE
            body.append(_text(_MARGIN, y, line, "soft"))
    for block in (_speeds(report), _bytes(report), _times(report)):
        if block is not None:
            y = _draw(body, y + 38, block)
    height = y + 18
    label = escape(f"{report.decode.tokens_per_second.median:.1f} tokens a second in decode")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">\n'
        f"<style>{_STYLE}</style>\n"
        f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="8"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _speeds(report: BenchReport) -> _Block:
    rows = (_speed(_ANSWER, report.decode), _speed(_PROMPT, report.prefill))
    full = max(1.0, *(row.total for row in rows))
    return _Block(
        "Speed, beside the most that this machine allows",
        rows,
        "share of the most that is possible (%)",
        full,
        _percents(full),
    )


def _speed(label: str, phase: PhaseReport) -> _Row:
    said = f"{number(phase.tokens_per_second.median)} tokens/s"
    if phase.share is None:
        return _Row(label, f"{said}, limit not known")
    return _Row(label, f"{said}, {percent_text(phase.share)}", (("done", phase.share),))


def _bytes(report: BenchReport) -> _Block | None:
    rows = []
    for label, phase in ((_ANSWER, report.decode), (_PROMPT, report.prefill)):
        # The prompt's reads of memory are shared by its tokens and not counted.
        sizes = (
            ("memory", phase.memory_bytes or 0.0),
            ("host", phase.host_bytes),
            ("disk", phase.disk_bytes),
        )
        pieces = tuple(piece for piece in sizes if piece[1] > 0)
        if pieces:
            row = _Row(label, "", pieces)
            rows.append(_Row(label, human_size(round(row.total)), pieces))
    if not rows:
        return None
    most = max(row.total for row in rows)
    unit = unit_for(most)
    return _Block(
        "Where the bytes of a token come from",
        tuple(rows),
        f"bytes that a token needs ({unit.name})",
        most,
        _figures(most, unit.nbytes),
        _kinds(rows, _TIERS),
    )


def _times(report: BenchReport) -> _Block:
    rows = [_time(_ANSWER, report.decode), _time(_PROMPT, report.prefill)]
    words = {"compute": "computing", "wait": "waiting for experts"}
    return _Block(
        "What the time of a token goes into",
        tuple(rows),
        "share of the time (%)",
        1.0,
        _percents(1.0),
        _kinds(rows, words),
    )


def _time(label: str, phase: PhaseReport) -> _Row:
    share = min(1.0, phase.waited_share)
    seconds = 1.0 / phase.tokens_per_second.median
    digits = 0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2
    pieces = (("compute", 1.0 - share), ("wait", share))
    return _Row(
        label,
        f"{seconds * 1e3:,.{digits}f} ms a token",
        tuple(piece for piece in pieces if piece[1] > 0),
    )


def _kinds(rows: Sequence[_Row], words: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """What a legend has to explain: the kinds that are drawn, in their order."""
    drawn = {kind for row in rows for kind, _ in row.pieces}
    return tuple((kind, word) for kind, word in words.items() if kind in drawn)


def _percents(full: float) -> tuple[tuple[float, str], ...]:
    return tuple((n / 4, f"{25 * n}") for n in range(5) if n / 4 <= full)


def _figures(most: float, unit: int) -> tuple[tuple[float, str], ...]:
    """Round figures up to ``most``, three to six of them."""
    step, digits = round_step(most / unit)
    count = math.floor(most / unit / step + 1e-9) + 1
    return tuple((n * step * unit, f"{n * step:,.{digits}f}") for n in range(count))


def _draw(body: list[str], y: int, block: _Block) -> int:
    """Add the block from the base line of its heading on; the base line of its last text."""
    body.append(_text(_MARGIN, y, block.head, "text head"))
    if block.legend:
        y += _LINE + 2
        x = float(_MARGIN)
        for kind, name in block.legend:
            body.append(f'<rect class="{kind}" x="{x:.1f}" y="{y - 10}" width="11" height="11"/>')
            body.append(_text(x + 17, y, name, "soft"))
            x += 17 + _LETTER * len(name) + 18
    room = _WIDTH - 2 * _MARGIN
    scale = room / block.full
    y += 6
    for row in sorted(block.rows, key=lambda row: bool(row.pieces)):  # the axis lies below bars
        body.append(_text(_MARGIN, y + 16, row.label, "text"))
        body.append(_text(_WIDTH - _MARGIN, y + 16, row.figure, "text", "end"))
        y += 22
        if not row.pieces:
            continue
        body.append(_rect(_MARGIN, y, room, "rail"))
        x = float(_MARGIN)
        for kind, length in row.pieces:
            body.append(_rect(x, y, length * scale, kind))
            x += length * scale
        y += _ROW - 22
    if not any(row.pieces for row in block.rows):
        return y
    y -= _ROW - 22 - _BAR
    for value, label in block.ticks:
        at = _MARGIN + value * scale
        anchor = "start" if value <= 0 else "end" if value >= 0.97 * block.full else "middle"
        body.append(f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{y + 1}" y2="{y + 6}"/>')
        body.append(_text(at, y + 20, label, "soft", anchor))
    body.append(_text(_WIDTH / 2, y + 39, block.axis, "soft axis", "middle"))
    return y + 39


def _broken(line: str) -> list[str]:
    """A line of facts in as many lines as it needs, broken between them."""
    room = int((_WIDTH - 2 * _MARGIN) / _LETTER)
    lines: list[str] = []
    for part in line.split(" · "):
        if lines and len(lines[-1]) + len(part) + 3 <= room:
            lines[-1] += f" · {part}"
        else:
            lines.append(part if len(part) <= room else f"…{part[-room + 1 :]}")
    return lines


def _rect(x: float, y: int, width: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}"/>'


def _text(x: float, y: int, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
