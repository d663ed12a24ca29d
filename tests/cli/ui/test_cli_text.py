"""Pure functions on text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.cli.ui.text import (
    counted,
    duration,
    path_text,
    percent,
    percent_whole,
    printable,
    span,
    to_ascii,
    without_controls,
)


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    clean = without_controls(text)
    assert not any(ord(c) < 0x20 and c not in "\n\t" for c in clean)
    assert not any(0x7F <= ord(c) < 0xA0 for c in clean)
    assert all(c in text for c in clean)


def test_an_escape_sequence_is_disarmed_and_plain_text_stays() -> None:
    assert without_controls("a\x1b[2Jb\x9b31mc\r\u202ed") == "a[2Jb31mcd"
    assert without_controls("Grüße\n\t“ok” 日本語 👍") == "Grüße\n\t“ok” 日本語 👍"


@given(st.text())
def test_a_stream_is_as_safe_as_the_whole(text: str) -> None:
    assert "".join(without_controls(c) for c in text) == without_controls(text)


@given(st.text())
def test_printable_is_one_line(text: str) -> None:
    assert "\n" not in printable(text)
    assert "\x1b" not in printable(text)


@given(st.text())
def test_ascii_is_ascii(text: str) -> None:
    assert to_ascii(text).isascii()


def test_symbols_have_a_readable_stand_in() -> None:
    assert to_ascii("❯ 64–8 · ≥ 80 % ×1.2") == "> 64-8 | >= 80 % x1.2"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (0.41, "0.4 s"), (42.4, "42 s"), (200, "3:20"), (3723, "1:02:03")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_percent_shows_tenths_only_where_there_are_any() -> None:
    assert percent(0.25) == "25 %"
    assert percent(0.125) == "12.5 %"
    assert percent_whole(0.999) == "99 %"
    assert percent_whole(1.0) == "100 %"


def test_counted_and_span() -> None:
    assert counted(1, "layer") == "1 layer"
    assert counted(1024, "expert") == "1,024 experts"
    assert span([64, 64]) == "64"
    assert span([64, 8]) == "8–64"
    assert span([]) == "0"


def test_path_is_what_one_would_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_text("out") == "./out"
    assert path_text(tmp_path) == "."
    assert path_text(Path(os.sep) / "elsewhere") == f"{os.sep}elsewhere"
    assert path_text("my out") == "'./my out'"
