"""A conversation on a true terminal: what is typed meanwhile is not shown, and Markdown is shown once, at the end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conmoe_edge.cli.chat_loop.repl import Repl
from conmoe_edge.cli.chat_loop.silent_keys import silent_keys
from conmoe_edge.cli.ui.output import Output
from tests.cli.chat_loop.test_repl import Lines, Session
from tests.patience import PATIENCE

pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")


class Screen:
    """A pseudo terminal, as stdin and stdout of this process."""

    def __init__(self, patch: pytest.MonkeyPatch, columns: int, rows: int) -> None:
        import fcntl
        import struct

        self.keyboard, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.inner = inner
        for name in ("stdin", "stdout"):
            mode = "r" if name == "stdin" else "w"
            patch.setattr(sys, name, os.fdopen(os.dup(inner), mode, encoding="utf-8"))
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm-256color")
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self.keyboard, 4096)
            except OSError:
                return
            if not piece:
                return
            self._seen += piece

    def type(self, text: str) -> None:
        os.write(self.keyboard, text.encode())

    def end(self) -> str:
        """Everything that was shown."""
        sys.stdout.flush()
        sys.stdout.close()
        sys.stdin.close()
        os.close(self.inner)
        self._reader.join(PATIENCE)
        return self._seen.decode()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Screen]]:
    def make(columns: int = 40, rows: int = 20) -> Screen:
        return Screen(monkeypatch, columns, rows)

    yield make


def talk(session: Session, **looks: Any) -> None:
    stand_in: Any = session
    Repl(stand_in, Output(quiet=True), name="out", **looks).run(Lines("hi"))


def test_keys_are_not_shown_and_not_lost(screen: Callable[..., Screen]) -> None:
    one = screen()
    before = termios.tcgetattr(one.inner)
    with silent_keys():
        one.type("typed\n")
        assert os.read(one.inner, 100) == b"typed\n"
    assert termios.tcgetattr(one.inner) == before
    assert "typed" not in one.end()


def test_markdown_is_rendered_once_when_the_answer_is_whole(screen: Callable[..., Screen]) -> None:
    one = screen()
    talk(Session(["Some **bo", "ld** words\n", "- a\n- b"]))
    seen = one.end()
    streamed, _, rendered = seen.partition("\x1b[3A\r\x1b[J")
    assert "Some **bold** words" in streamed, "it came as it was made"
    assert "**" not in rendered and "bold" in rendered and " • " in rendered


@pytest.mark.parametrize(
    ("answer", "rows", "looks"),
    [
        ("Plain prose, no signs.", 20, {}),
        ("**bold** words", 20, {"markdown": False}),
        ("- one\n" * 30, 20, {}),
    ],
    ids=["prose", "switched off", "longer than the screen"],
)
def test_otherwise_it_stays_as_it_came(
    answer: str, rows: int, looks: dict[str, bool], screen: Callable[..., Screen]
) -> None:
    one = screen(rows=rows)
    talk(Session([answer]), **looks)
    seen = one.end()
    assert "A\r\x1b[J" not in seen
    assert seen.replace("\r\n", "\n").rstrip("\n") == answer.rstrip("\n")


def test_control_characters_of_a_model_do_nothing(screen: Callable[..., Screen]) -> None:
    one = screen()
    talk(Session(["a\x1b]52;c;eA==\x07b\x1b[2J"]))
    assert "\x1b" not in one.end()
