"""Sizes and paths as people write them. Pure functions, no imports from the rest of the package.

``24GB`` is decimal (24 * 10**9 bytes), the safe reading of an ambiguous word; ``24GiB`` is exact (24 * 2**30).
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Unit:
    """A binary unit and how many digits behind the point are shown in it."""

    name: str
    nbytes: int
    digits: int

    def text(self, count: float) -> str:
        """``count`` bytes in this unit, without its name: ``1,022.4``; what would round to nothing is ``<0.1``."""
        least = 10.0**-self.digits
        if 0 < count / self.nbytes < least / 2:
            return f"<{least:.{self.digits}f}"
        return f"{count / self.nbytes:,.{self.digits}f}"


_BINARY = (Unit("B", 1, 0), Unit("KiB", KIB, 1), Unit("MiB", MIB, 1), Unit("GiB", GIB, 2))


def unit_for(count: float) -> Unit:
    """The unit in which so many bytes read best: the first in which the rounded number is below 1024.

    A table or a sum that has one unit for all of its rows takes that of its largest.
    """
    for unit in _BINARY[:-1]:
        if round(abs(count) / unit.nbytes, unit.digits) < 1024:
            return unit
    return _BINARY[-1]


def human_size(count: float) -> str:
    """Bytes in the binary unit that reads best: ``512 B``, ``12.0 MiB``, ``6.00 GiB``."""
    unit = unit_for(count)
    return f"{count / unit.nbytes:.{unit.digits}f} {unit.name}"


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
