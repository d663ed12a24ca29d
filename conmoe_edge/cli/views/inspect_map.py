"""The router slots of a package as a map of characters: a row a layer, two characters a slot.

The first says how much of its layer's routing weight the slot had, the second what became of it. Both read without
colour, and in ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from conmoe_edge.report.package_summary import PackageSummary
from conmoe_edge.report.slot_shares import SlotFact

_LEVELS = ((2.0, "█"), (1.0, "▓"), (0.5, "▒"), (0.25, "░"), (0.0, " "))
_MARKS = {"prototype": "●", "alias": " ", "constant": "-", "dropped": "x"}
_STYLES = {"prototype": "bold cyan", "alias": "", "constant": "yellow", "dropped": "red"}
_LABEL = 7
_STEP = 8


def slot_map(facts: PackageSummary, width: int) -> RenderableType:
    """The whole map, in lines of at most ``width`` characters."""
    longest = max(len(row) for row in facts.slots.values())
    per_line = min(longest, max(_STEP, (width - _LABEL) // 2 // _STEP * _STEP))
    lines: list[RenderableType] = [_legend(facts), _numbers(min(per_line, longest))]
    for group in facts.scopes:
        if facts.manifest.scope > 1 and group != facts.scopes[0]:
            lines.append(Text())
        for layer in group:
            row = facts.slots[layer]
            for start in range(0, len(row), per_line):
                label = f"{layer:>5}  " if start == 0 else f"{'+' + str(start):>5}  "
                lines.append(_line(label, row[start : start + per_line], facts.usage is None))
    return Group(*lines)


def level(relative: float) -> str:
    """The character for a slot that had ``relative`` times an equal share."""
    return next(glyph for least, glyph in _LEVELS if relative >= least)


def _line(label: str, row: Sequence[SlotFact], bare: bool) -> Text:
    text = Text(label, style="dim")
    for slot in row:
        glyph = " " if slot.relative is None else level(slot.relative)
        # Without shades an alias would be nothing at all.
        mark = "~" if bare and slot.kind == "alias" else _MARKS[slot.kind]
        text.append(glyph + mark, style=_STYLES[slot.kind] or "not dim")
    return text


def _numbers(count: int) -> Text:
    text = f"{'layer':<{_LABEL}}" + "".join(f"{n:<{2 * _STEP}}" for n in range(0, count, _STEP))
    return Text(text.rstrip(), style="dim")


def _legend(facts: PackageSummary) -> Text:
    counts = facts.counts()
    words = {"prototype": "its own expert", "constant": "a constant", "dropped": "nothing"}
    marks = [f"{_MARKS[kind]} {word}" for kind, word in words.items() if counts[kind]]
    if counts["alias"]:
        marks.append("~ another's" if facts.usage is None else "unmarked: another's")
    lines = ["  A row is a layer, two characters a slot: its weight, and what is behind it."]
    lines.append(f"  Behind it: {', '.join(marks)}.")
    if facts.usage is not None:
        of = "routing weight" if facts.usage.source == "calibration" else "choices in the trace"
        lines.append(
            f"  {of.capitalize()}: █ at least 2 equal shares, ▓ 1, ▒ 0.5, ░ 0.25, blank less"
        )
    return Text("\n".join(lines), style="dim")
