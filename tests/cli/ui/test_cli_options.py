"""What the flags take for a share, a count, a number of tokens."""

from __future__ import annotations

from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.cli.ui.cli_options import CountOrAuto, Share, Tokens, debug_wanted


def convert(kind: click.ParamType, text: str) -> Any:
    return kind.convert(text, None, None)


@given(st.integers(0, 99))
def test_a_share_is_the_same_in_percent_and_as_a_number(percent: int) -> None:
    assert convert(Share(), f"{percent}%") == percent / 100
    assert convert(Share(), f"{percent} %") == percent / 100
    assert convert(Share(), str(percent / 100)) == percent / 100


@pytest.mark.parametrize("text", ["25", "-0.1", "1.5", "120%", "nan", "inf", "x", "", "%", "auto"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        convert(Share(), text)


def test_one_is_a_share_but_not_a_rate() -> None:
    assert convert(Share(), "1") == 1
    assert convert(Share(auto=True, below_one=True), "AUTO") == "auto"
    for text in ("1", "100%"):
        with pytest.raises(click.BadParameter, match="below 1"):
            convert(Share(below_one=True), text)


def test_a_bare_percentage_gets_both_spellings() -> None:
    with pytest.raises(click.BadParameter, match=r"say 25% or 0\.25"):
        convert(Share(), "25")
    with pytest.raises(click.BadParameter, match=r"say 5% or 0\.05"):
        convert(Share(), "5")


def test_tokens_take_thousands_and_k() -> None:
    assert convert(Tokens(), "4096") == 4096
    assert convert(Tokens(), "4,096") == 4096
    assert convert(Tokens(), "32k") == 32768
    for text in ("0", "-1", "k", "1.5k", "many"):
        with pytest.raises(click.BadParameter):
            convert(Tokens(), text)


def test_count_or_auto() -> None:
    assert convert(CountOrAuto(), "auto") == "auto"
    assert convert(CountOrAuto(), "4") == 4
    for text in ("0", "-2", "two"):
        with pytest.raises(click.BadParameter):
            convert(CountOrAuto(), text)


def test_debug_by_flag_or_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONMOE_DEBUG", raising=False)
    assert debug_wanted(True)
    assert not debug_wanted(False)
    monkeypatch.setenv("CONMOE_DEBUG", "0")
    assert not debug_wanted(False)
    monkeypatch.setenv("CONMOE_DEBUG", "1")
    assert debug_wanted(False)
