"""An answer on a terminal as it comes, broken between words. Knows how many lines it has taken.

A terminal breaks lines between any two characters. Here the part of a word that stands at the edge is taken back and
written on the next line. What is written to anything else than a terminal is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.cells import cell_len

_PIECES = re.compile(r"\n|[^\S\n]|\S")


class WrappedStream:
    """Writes pieces of text.

    Attributes:
        rows: lines that are full or ended so far.
        text: all that came.
    """

    def __init__(self, write: Callable[[str], None], columns: Callable[[], int]) -> None:
        """``columns``: cells in a line now."""
        self.rows = 0
        self.text = ""
        self._write, self._columns = write, columns
        self._first_columns = columns()
        self._at = 0
        self._word = ""

    @property
    def resized(self) -> bool:
        """Whether the terminal has another width than at the beginning, so that ``rows`` says nothing."""
        return self._columns() != self._first_columns

    def add(self, piece: str) -> None:
        """The next piece."""
        self.text += piece
        out: list[str] = []
        for character in _PIECES.findall(piece):
            self._one(character, out)
        self._write("".join(out))

    def end(self) -> None:
        """End the last line."""
        if self._at or not self.text.endswith("\n"):
            self.text += "\n"
            self._write("\n")
            self.rows += 1
            self._at, self._word = 0, ""

    def _one(self, character: str, out: list[str]) -> None:
        if character == "\n":
            out.append("\n")
            self.rows += 1
            self._at, self._word = 0, ""
            return
        columns = self._columns()
        cells = 8 - self._at % 8 if character == "\t" else cell_len(character)
        if self._at + cells > columns:
            self._break(character, out)
            if character.isspace():
                return  # the blank between two lines
        out.append(character)
        self._at += cells
        self._word = "" if character.isspace() else self._word + character

    def _break(self, character: str, out: list[str]) -> None:
        """Go to the next line, and take the word that is being written along, unless it fills the line."""
        self.rows += 1
        taken = self._word if not character.isspace() else ""
        cells = cell_len(taken)
        if not taken or cells >= self._at:
            out.append("\n")
            self._at, self._word = 0, ""
            return
        # Where the last column is filled, some terminals have the cursor on it and some behind: \r is the same in both.
        start = self._at - cells
        out.append(f"\r\x1b[{start}C\x1b[K\n{taken}")
        self._at = cells
