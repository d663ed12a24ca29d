"""Where text goes in each mode."""

from __future__ import annotations

import io
import json
import sys

import pytest

from conmoe_edge.cli.ui.error_text import ErrorText
from conmoe_edge.cli.ui.output import Output, speaks_unicode


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def everything(output: Output) -> None:
    output.note("a note")
    output.result("a result")
    output.value({"a": 1})
    output.warning("a warning")


def test_human(capsys: pytest.CaptureFixture[str]) -> None:
    everything(Output())
    seen = capsys.readouterr()
    assert seen.out == "a result\n"
    assert seen.err == "a note\nwarning: a warning\n"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    everything(Output(as_json=True))
    seen = capsys.readouterr()
    assert json.loads(seen.out) == {"schema_version": 1, "a": 1}
    assert "a note" in seen.err


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    everything(Output(quiet=True))
    seen = capsys.readouterr()
    assert seen.out == "a result\n"
    assert seen.err == "warning: a warning\n"


def test_what_json_cannot_write_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).value({"a": float("nan"), "b": [float("inf"), (1.5,)]})
    assert json.loads(capsys.readouterr().out) == {
        "schema_version": 1,
        "a": None,
        "b": [None, [1.5]],
    }


def test_text_is_taken_literally(capsys: pytest.CaptureFixture[str]) -> None:
    Output().result("[bold]model[/bold] :smile: 12.5")
    assert capsys.readouterr().out == "[bold]model[/bold] :smile: 12.5\n"


def test_long_lines_are_not_folded_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error(ErrorText("X", "word " * 100))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_console_without_unicode_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    output = Output()
    output.result("❯ 25 % · 64–8 日")
    output.stream("≥ π\n")
    sys.stdout.flush()
    assert raw.getvalue().decode("ascii").split("\n") == ["> 25 % | 64-8 ?", ">= ?", ""]


def test_which_streams_speak_unicode() -> None:
    assert speaks_unicode(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert not speaks_unicode(io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert not speaks_unicode(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    stream = Terminal()
    stream_encoding = property(lambda self: "utf-8")
    monkeypatch.setattr(Terminal, "encoding", stream_encoding, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    Output().error(ErrorText("X", "broken"))
    assert ("\x1b[1;31m" in stream.getvalue()) == coloured
    assert "broken" in stream.getvalue()
