"""How long a package stays in memory after its last answer, in ollama's words. No torch.

A number of seconds, or a text of numbers with units as Go reads them (``5m``, ``1h30m``, ``1.5h``, ``300ms``), or a
text of a number, which is seconds too. Below 0, and ``forever``: always. 0: not beyond the answer. Source: ollama's
documents of its API and its FAQ, "How do I keep a model loaded in memory".
"""

from __future__ import annotations

import math
import re
from typing import Any

FOREVER = math.inf
DEFAULT_SECONDS = 300.0

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_LONGEST_TEXT = 40


def keep_alive_seconds(value: Any) -> float:
    """Seconds; ``FOREVER`` for always.

    Raises:
        ValueError: it is no such time.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _of_number(float(value))
    text = value.strip() if isinstance(value, str) else ""
    if not 0 < len(text) <= _LONGEST_TEXT:
        raise ValueError("no time")
    if text.lower() == "forever":
        return FOREVER
    if _NUMBER.fullmatch(text):
        return _of_number(float(text))
    sign, rest = (text[0], text[1:]) if text[0] in "+-" else ("+", text)
    parts = list(_PART.finditer(rest))
    if not parts or "".join(part[0] for part in parts) != rest:
        raise ValueError("no time")
    seconds = sum(float(part[1]) * _UNITS[part[2]] for part in parts)
    return _of_number(-seconds if sign == "-" else seconds)


def _of_number(seconds: float) -> float:
    if math.isnan(seconds):
        raise ValueError("no time")
    return FOREVER if seconds < 0 else seconds


def keep_alive_text(seconds: float) -> str:
    """As people write it: ``5m``, ``90s``, ``forever``."""
    if seconds == FOREVER:
        return "forever"
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:g}s"
