"""Every command line in the documents is one that the program takes: no flag, choice or command of another time."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from conmoe_edge.cli.main import main

_ROOT = Path(__file__).resolve().parents[2]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
_LINE = re.compile(r"^(?:    |\$ )(?:\w+=\S+ )*conmoe-edge (.*)$", re.MULTILINE)
_INLINE = re.compile(r"`conmoe-edge ([^`]*?)`", re.DOTALL)
_END = re.compile(r"\s#\s|\s[|;<>&]|\s{3,}|$", re.MULTILINE)
_SAID = ("SIZE", "METHOD", "RATE", "FILE", "...", "…", "N", "B")
"""Words that stand for a value; a line with one of them in the place of a number is not read."""


def lines() -> Iterator[tuple[str, str]]:
    for page in _PAGES:
        text = page.read_text(encoding="utf-8")
        if page.name == "cli.md":
            text = "\n".join(re.findall(r"^    conmoe-edge .*$", text, re.MULTILINE))
        found = [*_LINE.findall(text), *(" ".join(one.split()) for one in _INLINE.findall(text))]
        for line in dict.fromkeys(found):
            end = _END.search(line)
            yield page.name, line[: end.start()] if end else line


def parse(words: list[str]) -> None:
    """As the program does before it begins; raises click's exceptions."""
    context = main.make_context("conmoe-edge", list(words))
    _name, command, rest = main.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    made = command.make_context(command.name or "", rest, parent=context)
    if isinstance(command, click.Group) and (left := [*made._protected_args, *made.args]):
        _name, inner, rest = command.resolve_command(made, left)
        assert inner is not None
        inner.make_context(inner.name or "", rest, parent=made)


@pytest.mark.parametrize(
    ("page", "line"), [pytest.param(*one, id=": ".join(one)) for one in lines()]
)
def test_it_is_taken(page: str, line: str) -> None:
    words = shlex.split(line)
    if len(words) < 2 or {"COMMAND", "--help", "-h", "--version", *_SAID} & set(words):
        pytest.skip("only named, stands for several, or leaves at once")
    parse(words)
