"""Streamed text on a terminal: lines end between words, and the lines that it takes are counted."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest
from rich.cells import cell_len

from conmoe_edge.cli.chat_loop.wrapped_stream import WrappedStream

_CODES = re.compile(r"\x1b\[(\d*)([CK])|.", re.DOTALL)


class Terminal:
    """As much of a terminal as a wrapped stream needs: it breaks lines anywhere, by itself."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: list[list[str]] = [[]]
        self.at = 0

    def write(self, text: str) -> None:
        for match in _CODES.finditer(text):
            number, code = match.groups()
            if code == "C":
                self.at += int(number)
            elif code == "K":
                del self.lines[-1][self.at :]
            elif match[0] == "\r":
                self.at = 0
            elif match[0] == "\n":
                self.lines.append([])
                self.at = 0
            else:
                self._put(match[0])

    def _put(self, character: str) -> None:
        cells = cell_len(character)
        if self.at + cells > self.columns:
            self.lines.append([])
            self.at = 0
        line = self.lines[-1]
        line[self.at :] = [character, *[""] * (cells - 1)]
        self.at += cells

    @property
    def screen(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


def shown(pieces: Sequence[str], columns: int) -> tuple[list[str], WrappedStream]:
    terminal = Terminal(columns)
    stream = WrappedStream(terminal.write, lambda: columns)
    for piece in pieces:
        stream.add(piece)
    stream.end()
    return terminal.screen, stream


def test_a_word_at_the_edge_goes_to_the_next_line() -> None:
    screen, stream = shown(["the quick br", "own fo", "x"], 12)
    assert screen == ["the quick", "brown fox", ""]
    assert stream.rows == 2 and stream.text == "the quick brown fox\n"


def test_a_word_longer_than_the_line_is_broken() -> None:
    assert shown(["a " + "x" * 25], 10)[0] == ["a", "x" * 10, "x" * 10, "x" * 5, ""]


def test_a_line_that_is_just_full_takes_one_row() -> None:
    screen, stream = shown(["1234567890\nnext"], 10)
    assert screen == ["1234567890", "next", ""] and stream.rows == 2
    assert shown(["12345 7890 more"], 10)[0] == ["12345 7890", "more", ""]


def test_wide_characters_take_two_cells() -> None:
    screen, stream = shown(["世界世界世界"], 8)
    assert screen == ["世界世界", "世界", ""] and stream.rows == 2


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_the_screen_and_no_word_is_lost(seed: int) -> None:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcé世", k=draw.randint(1, 9))) for _ in range(60)]
    text = "".join(word + draw.choice([" ", " ", " ", "  ", "\n", "\n\n"]) for word in words)
    pieces, at = [], 0
    while at < len(text):
        step = draw.randint(1, 7)
        pieces.append(text[at : at + step])
        at += step
    columns = draw.randint(20, 40)
    screen, stream = shown(pieces, columns)
    assert stream.rows == len(screen) - 1
    assert all(cell_len(line) <= columns for line in screen)
    assert " ".join(screen).split() == text.split(), "every word fits a line, so none is broken"
