"""What a document says that a command prints, beside what it prints: the same lines with other figures."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d[\d,.]*")
_BLANKS = re.compile(r"\s+")
_MAP = re.compile(r"^\s*\d+\s+[░▒▓█● ]+$")


def blocks(name: str) -> list[str]:
    """The printed blocks of a document, in order."""
    return _BLOCK.findall((DOCS / name).read_text(encoding="utf-8"))


def skeleton(text: str) -> list[str]:
    """Its lines without figures, blanks and drawings; units stay."""
    lines = []
    for line in text.splitlines():
        plain = "<map>" if _MAP.match(line) else _NUMBER.sub("#", line)
        plain = _BLANKS.sub(" ", plain).strip()
        if plain:
            lines.append(plain)
    return lines


def check_printed(block: str, output: str) -> None:
    """Every line of ``block`` is a line of ``output``, in the same order, apart from figures."""
    found = iter(skeleton(output))
    for line in skeleton(block):
        assert any(line == other for other in found), f"no longer printed: {line}\n\n{output}"
