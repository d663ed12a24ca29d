"""Every line of docs/features.md says how a thing is done, and names a test or a page that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "features.md"
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_PAGE = re.compile(r"\]\(([\w./-]+\.md)\)")
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| feature", "| ---"))
]


def test_there_are_rows() -> None:
    assert len(ROWS) > 50 and len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_shows_it_is_there(row: tuple[str, ...]) -> None:
    feature, here, shown = row
    assert feature and here
    tests, pages = _TEST.findall(shown), _PAGE.findall(shown)
    assert tests or (pages and here.startswith("no")), f"{feature}: nothing shows it"
    for page in pages:
        assert (PAGE.parent / page).is_file(), page
    for file, name in tests:
        path = ROOT / file
        assert path.is_file(), file
        functions = {
            node.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert not name or name in functions, f"{file} has no {name}"
