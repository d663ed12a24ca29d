"""Sizes and paths as people write them. Pure functions, no imports from the rest of the package.

``24GB`` is decimal (24 * 10**9 bytes), the safe reading of an ambiguous word; ``24GiB`` is exact (24 * 2**30).
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_UNITS = {
    "b": 1,
    "": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*$")


def parse_size(text: str) -> int | None:
    """Bytes of ``"24GB"``, ``"7.5 GiB"``, ``"512MB"``; ``None`` where the text is no size at all.

    A bare number has no unit and is refused as well (``None``): "8" might mean bytes or gigabytes.
    """
    match = _SIZE.match(text)
    if match is None or not match.group(2):
        return None
    unit = match.group(2).lower()
    if unit not in _UNITS:
        return None
    return int(float(match.group(1)) * _UNITS[unit])


def gib(count: int) -> str:
    """Bytes as GiB with two digits: ``22.35 GiB``."""
    return f"{count / GIB:.2f} GiB"


def human_size(count: int) -> str:
    """Bytes in the binary unit that reads best: ``512 B``, ``12.0 MiB``, ``6.00 GiB``."""
    if count < KIB:
        return f"{count} B"
    if count < MIB:
        return f"{count / KIB:.1f} KiB"
    if count < GIB:
        return f"{count / MIB:.1f} MiB"
    return f"{count / GIB:.2f} GiB"


def round_up(count: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``count``."""
    return -(-count // multiple) * multiple


def printable(text: str) -> str:
    """One line that is safe to show: names of files and models may hold anything."""
    return "".join(c if c.isprintable() and unicodedata.category(c) != "Cf" else "?" for c in text)


def path_text(path: Path | str) -> str:
    """A path as one would type it: ``./out`` below the current folder, the whole path elsewhere;
    quoted where needed.
    """
    full = Path(path).expanduser().absolute()
    here = Path.cwd()
    if full == here:
        text = "."
    elif full.is_relative_to(here):
        text = f"./{full.relative_to(here).as_posix()}"
    else:
        text = str(full)
    return shlex.quote(printable(text))
