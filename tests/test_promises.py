"""``docs/promises.md`` names a test for every promise; each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "promises.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def named_tests() -> list[tuple[str, str]]:
    """(file, function) of every test that the page names; the function may be empty."""
    return sorted(set(NAMED.findall(PAGE.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(("file", "name"), named_tests(), ids="::".join)
def test_the_test_of_a_promise_is_there(file: str, name: str) -> None:
    path = ROOT / file
    assert path.is_file(), f"{PAGE.name} names {file}"
    functions = {
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not name or name in functions, f"{file} has no {name}"


def test_every_promise_names_a_test_and_a_figure() -> None:
    rows = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith(("| promise", "| ---"))
    ]
    assert len(rows) > 20
    for row in rows:
        promise, held_by, figure = (cell.strip() for cell in row.strip("|").split("|"))
        assert promise and NAMED.search(held_by) and figure, row
