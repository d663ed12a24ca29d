"""The prompt, driven through a real prompt_toolkit session with a pipe for a keyboard."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.input.base import PipeInput
from prompt_toolkit.output import DummyOutput

from conmoe_edge.cli.chat_loop.prompt_input import (
    Reader,
    continuation,
    is_open,
    open_history,
    unfence,
)

ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A"
PASTE, PASTE_END = "\x1b[200~", "\x1b[201~"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


def reader(keyboard: PipeInput) -> Reader:
    return Reader(["/help", "/bye"], InMemoryHistory(), keyboard, DummyOutput())


def test_enter_sends(keyboard: PipeInput) -> None:
    keyboard.send_text(f"hello{ENTER}")
    assert reader(keyboard).read() == "hello"


def test_alt_enter_is_a_new_line(keyboard: PipeInput) -> None:
    keyboard.send_text(f"one{ALT_ENTER}two{ENTER}")
    assert reader(keyboard).read() == "one\ntwo"


def test_three_quotes_hold_several_lines(keyboard: PipeInput) -> None:
    keyboard.send_text(f'"""{ENTER}one{ENTER}two{ENTER}"""{ENTER}')
    assert reader(keyboard).read() == "one\ntwo"


def test_pasted_lines_are_one_message(keyboard: PipeInput) -> None:
    keyboard.send_text(f"{PASTE}one\ntwo\nthree{PASTE_END}{ENTER}")
    assert reader(keyboard).read() == "one\ntwo\nthree"


def test_pasted_quotes_are_one_message(keyboard: PipeInput) -> None:
    keyboard.send_text(f'{PASTE}"""\none\n"""{PASTE_END}{ENTER}')
    assert reader(keyboard).read() == "one"


def test_ctrl_c_empties_the_line_first(keyboard: PipeInput) -> None:
    keyboard.send_text(f"not this{CTRL_C}this{ENTER}")
    assert reader(keyboard).read() == "this"


def test_ctrl_c_and_ctrl_d_at_an_empty_line(keyboard: PipeInput) -> None:
    one = reader(keyboard)
    keyboard.send_text(CTRL_C)
    with pytest.raises(KeyboardInterrupt):
        one.read()
    keyboard.send_text(CTRL_D)
    with pytest.raises(EOFError):
        one.read()


def test_what_was_typed_comes_back(keyboard: PipeInput, tmp_path: Path) -> None:
    history = FileHistory(str(tmp_path / "h"))
    keyboard.send_text(f"first{ENTER}")
    assert Reader([], history, keyboard, DummyOutput()).read() == "first"
    keyboard.send_text(f"{UP}{ENTER}")
    again = Reader([], FileHistory(str(tmp_path / "h")), keyboard, DummyOutput())
    assert again.read() == "first"


@pytest.mark.parametrize(
    ("text", "waits", "message"),
    [
        ("plain", False, "plain"),
        ('"""', True, '"""'),
        ('""""""', False, ""),
        ('"""a', True, '"""a'),
        ('"""a"""', False, "a"),
        ('"""\na\n\nb\n"""', False, "a\n\nb"),
        ('a """ b', False, 'a """ b'),
        ('"""""', True, '"""""'),
    ],
)
def test_fences(text: str, waits: bool, message: str) -> None:
    assert is_open(text) is waits
    assert unfence(text) == message


def test_the_history_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONMOE_STATE_DIR", str(tmp_path / "state"))
    path = tmp_path / "state" / "chat-history"
    history, problem = open_history(True)
    assert problem == ""
    history.append_string("secret")
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        open_history(True)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "secret" in path.read_text(encoding="utf-8")


def test_no_history_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONMOE_STATE_DIR", str(tmp_path / "state"))
    history, _ = open_history(False)
    history.append_string("secret")
    assert not (tmp_path / "state").exists()


def test_a_history_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_text("a file where the folder should be", encoding="utf-8")
    monkeypatch.setenv("CONMOE_STATE_DIR", str(tmp_path / "state"))
    history, problem = open_history(True)
    assert "no history" in problem
    assert isinstance(history, InMemoryHistory)


def test_a_draft_stands_in_the_prompt(keyboard: PipeInput) -> None:
    keyboard.send_text(f" more{ENTER}")
    assert reader(keyboard).read("a draft") == "a draft more"


def test_only_a_new_line_gets_dots() -> None:
    assert continuation(2, 1, 0) == ". "
    assert continuation(2, 0, 1) == "  ", "the terminal is too narrow, nobody began a line"
