"""Pure functions on text: numbers, durations, model output that is safe on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from conmoe_edge.units import path_text, printable

__all__ = [
    "counted",
    "duration",
    "path_text",
    "percent",
    "percent_whole",
    "printable",
    "span",
    "to_ascii",
    "to_encoding",
    "without_controls",
]

# What a console without UTF-8 gets instead; characters that are not listed, and that it lacks, become "?".
_ASCII = str.maketrans(
    {
        "❯": ">",
        "·": "|",
        "–": "-",
        "—": "-",
        "…": "...",
        "≥": ">=",
        "≤": "<=",
        "×": "x",
        "ρ": "rho",
        "✓": "+",
        "✗": "x",
        "━": "=",
        "╸": "=",
        "╺": "-",
        "─": "-",
        "“": '"',
        "”": '"',
        "’": "'",
        "→": "->",
        "●": "o",
        "░": ".",
        "▒": ":",
        "▓": "+",
        "█": "#",
        "±": "+/-",
        "\N{NO-BREAK SPACE}": " ",
    }
)


def to_ascii(text: str) -> str:
    """The text in plain ASCII, symbols replaced by what reads most like them."""
    return to_encoding(text, "ascii")


def to_encoding(text: str, encoding: str) -> str:
    """The text as a console with ``encoding`` can show it: symbols replaced by what reads most like them, letters kept
    where it has them.
    """
    return text.translate(_ASCII).encode(encoding, "replace").decode(encoding, "replace")


def without_controls(text: str) -> str:
    """The text without what a terminal obeys: escape sequences, carriage returns, C1 codes,
    direction overrides.

    Works character by character, so that a sequence which is split over two pieces of a stream is
    disarmed as well. Newline and tab stay.
    """
    return "".join(c for c in text if c in "\n\t" or not _is_control(c))


def _is_control(character: str) -> bool:
    code = ord(character)
    if code < 0x20 or 0x7F <= code < 0xA0:
        return True
    # Overrides and isolates turn the order of what follows on the line around; plain marks do not.
    return 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069


def percent(share: float) -> str:
    """``0.25`` as ``25 %``; tenths only where they are not zero."""
    value = round(100 * share, 1)
    return f"{value:.0f} %" if value == int(value) else f"{value:.1f} %"


def percent_whole(share: float) -> str:
    """A share without tenths, never rounded up to 100."""
    return f"{int(100 * share)} %"


def duration(seconds: float) -> str:
    """Seconds as ``0.4 s``, ``42 s``, ``3:20`` or ``1:02:03``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def counted(number: int, noun: str) -> str:
    """``1 layer``, ``16 layers``, ``1,024 experts``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def span(values: Iterable[int]) -> str:
    """One number where all agree, else the least and the greatest: ``64`` or ``8–64``."""
    seen = sorted(set(values))
    if not seen:
        return "0"
    return f"{seen[0]:,}" if len(seen) == 1 else f"{seen[0]:,}–{seen[-1]:,}"
