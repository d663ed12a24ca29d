"""The report of ``bench`` as one picture: an SVG file that needs nothing beside it (no fonts, no
scripts), on light and on dark ground.

Three blocks under one another: tokens a second against the bound, where the bytes of a token come
from, and how the time of a token divides into computing and waiting.
"""

from __future__ import annotations

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
from conmoe_edge.units import human_size

_WIDTH, _LEFT, _RIGHT = 720, 100, 124
_BAR, _STEP = 22, 34
_STYLE = """
  svg { font: 13px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif }
  .ground { fill: #ffffff } .text { fill: #1f2328 } .soft { fill: #59636e }
  .head { font-weight: 600 } .title { font-size: 17px; font-weight: 600 }
  .rail { fill: #eaeef2 } .line { stroke: #59636e; stroke-width: 2 }
  .done { fill: #0969da } .memory { fill: #54a3ff } .host { fill: #bf8700 } .disk { fill: #cf4a22 }
  .compute { fill: #1a7f37 } .wait { fill: #cf4a22 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } .text { fill: #e6edf3 } .soft { fill: #9198a1 }
    .rail { fill: #262c36 } .line { stroke: #9198a1 }
    .done { fill: #4493f8 } .memory { fill: #79c0ff } .host { fill: #d29922 } .disk { fill: #f0653b }
    .compute { fill: #3fb950 } .wait { fill: #f0653b }
  }
"""


@dataclass(frozen=True, slots=True)
class _Row:
    """One bar: pieces of (class, length), a mark across it, and what is said at its ends."""

    label: str
    pieces: tuple[tuple[str, float], ...]
    full: float
    note: str
    mark: float | None = None


def bench_svg(report: BenchReport) -> str:
    """The whole file."""
    body: list[str] = []
    y = 34
    body.append(_text(24, y, "conmoe-edge bench", "text title"))
    for line in (package_line(report), machine_line(report), runtime_line(report)):
        y += 20
        body.append(_text(24, y, line, "soft"))
    for head, legend, rows in _blocks(report):
        y += 40
        body.append(_text(24, y, head, "text head"))
        body += _legend(y, legend)
        y += 14
        for row in rows:
            body += _bar(y, row)
            y += _STEP
        y -= 8
    height = y + 22
    label = escape(f"{report.decode.tokens_per_second.median:.1f} tokens a second in decode")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">\n'
        f"<style>{_STYLE}</style>\n"
        f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="8"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


_Block = tuple[str, tuple[tuple[str, str], ...], Sequence[_Row]]


def _blocks(report: BenchReport) -> list[_Block]:
    decode, prefill = report.decode, report.prefill
    speeds = [_speed("decode", decode), _speed("prefill", prefill)]
    tiers = (("memory", "memory"), ("host", "host"), ("disk", "disk"))
    if report.facts.budget.above_disk:
        tiers = (tiers[0], tiers[2])
    waits = [_wait("decode", decode), _wait("prefill", prefill)]
    return [
        ("Tokens a second", (("done", "reached"), ("rail", "bound, one by one")), speeds),
        ("Bytes that a token needs", tiers, _bytes(report)),
        ("Time of a token", (("compute", "computing"), ("wait", "waiting for records")), waits),
    ]


def _speed(label: str, phase: PhaseReport) -> _Row:
    reached = phase.tokens_per_second.median
    note = number(reached)
    if phase.bound is None or phase.share is None:
        return _Row(label, (("done", reached),), reached, note)
    bound = 1.0 / phase.bound.serial
    note += f" · {percent_text(phase.share)}"
    return _Row(label, (("done", reached),), max(bound, reached), note, mark=bound)


def _bytes(report: BenchReport) -> list[_Row]:
    rows = []
    most = 0.0
    for label, phase in (("decode", report.decode), ("prefill", report.prefill)):
        pieces = (
            ("memory", phase.memory_bytes or 0.0),
            ("host", phase.host_bytes),
            ("disk", phase.disk_bytes),
        )
        total = sum(size for _, size in pieces)
        most = max(most, total)
        rows.append(_Row(label, pieces, 0.0, human_size(round(total)) if total else "–"))
    # One scale for both; the prompt's reads of memory are shared by its tokens and not counted.
    return [_Row(row.label, row.pieces, most, row.note) for row in rows]


def _wait(label: str, phase: PhaseReport) -> _Row:
    share = min(1.0, phase.waited_share)
    seconds = 1.0 / phase.tokens_per_second.median
    pieces = (("compute", 1.0 - share), ("wait", share))
    return _Row(label, pieces, 1.0, f"{seconds * 1e3:,.1f} ms")


def _bar(y: int, row: _Row) -> list[str]:
    room = _WIDTH - _LEFT - _RIGHT
    scale = room / row.full if row.full > 0 else 0.0
    out = [
        _text(_LEFT - 12, y + 16, row.label, "text", "end"),
        _rect(_LEFT, y, room, "rail"),
    ]
    x = float(_LEFT)
    for kind, length in row.pieces:
        if length > 0:
            out.append(_rect(x, y, length * scale, kind))
            x += length * scale
    if row.mark is not None:
        at = _LEFT + row.mark * scale
        out.append(
            f'<line class="line" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 3}" y2="{y + _BAR + 3}"/>'
        )
    out.append(_text(_WIDTH - _RIGHT + 10, y + 16, row.note, "text"))
    return out


def _legend(y: int, entries: Sequence[tuple[str, str]]) -> list[str]:
    """Small squares with their names, from the right edge leftwards."""
    out: list[str] = []
    x = float(_WIDTH - _RIGHT)
    for kind, name in reversed(entries):
        x -= 7.2 * len(name)
        out.append(_text(x, y, name, "soft"))
        x -= 16
        out.append(f'<rect class="{kind}" x="{x:.1f}" y="{y - 10}" width="11" height="11"/>')
        x -= 16
    return out


def _rect(x: float, y: int, width: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}"/>'


def _text(x: float, y: int, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
