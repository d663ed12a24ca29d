"""Every environment variable that the program reads is in docs/cli.md, or here with the reason why not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "conmoe_edge"
_NAME = re.compile(r"_?[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
_ASKS = ("get", "setdefault", "pop")

_TO_TEMPLATES = "handed on to the process that renders chat templates, which gets nothing else"
_TO_LIBRARIES = "said to a library, unless it is set; nobody needs another"
NOT_FOR_USERS = {
    "CONMOE_CRASH_AT": "of the tests that stop a fit at each of its durable steps",
    "_CONMOE_EDGE_COMPLETE": "set by the script of a shell when it asks what could follow",
    "PATH": _TO_TEMPLATES,
    "LD_LIBRARY_PATH": _TO_TEMPLATES,
    "DYLD_LIBRARY_PATH": _TO_TEMPLATES,
    "SYSTEMROOT": _TO_TEMPLATES,
    "TZ": _TO_TEMPLATES,
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": _TO_LIBRARIES,
    "TOKENIZERS_PARALLELISM": _TO_LIBRARIES,
}


def constants(sources: Iterator[str]) -> dict[str, str]:
    """Name -> text, of the constants of modules that could name a variable."""
    found = {}
    for source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                value, target = node.value.value, node.targets[0]
                if isinstance(target, ast.Name) and _is_name(value):
                    found[target.id] = value
    return found


def read_by(source: str, known: Mapping[str, str]) -> set[str]:
    """Variables that a module asks for. Where it asks for what a name stands for that is no constant, they are all that
    could be meant: every text of the module that looks like one, and every constant that it names.
    """
    tree = ast.parse(source)
    own = {**known, **constants(iter([source]))}
    found: set[str] = set()
    for asked in _asked(tree):
        if isinstance(asked, ast.Constant):
            found.add(str(asked.value))
        elif isinstance(asked, ast.Name) and asked.id in own:
            found.add(own[asked.id])
        else:
            found |= set(_texts(tree, own))
    return found


def _asked(tree: ast.AST) -> Iterator[ast.expr]:
    """What stands where a variable is named."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and _is_environment(node.value):
            if isinstance(node.ctx, ast.Load):
                yield node.slice
        elif isinstance(node, ast.Compare) and _is_environment(node.comparators[0]):
            yield node.left
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asks = node.func.attr in _ASKS and _is_environment(node.func.value)
            if asks or node.func.attr == "getenv":
                yield node.args[0]


def _texts(tree: ast.AST, known: Mapping[str, str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and _is_name(node.value):
            yield str(node.value)
        elif isinstance(node, ast.Name) and node.id in known:
            yield known[node.id]


def _is_environment(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def sources(ending: str) -> Iterator[str]:
    return (path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob(f"*{ending}")))


def all_read() -> set[str]:
    known = constants(sources(".py"))
    found = {name for source in sources(".py") for name in read_by(source, known)}
    for ending in (".h", ".cpp"):
        for source in sources(ending):
            found |= set(re.findall(r'getenv\("(\w+)"\)', source))
    return found


def named_on_the_page() -> set[str]:
    lines = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").splitlines()
    first = lines.index("| Variable | Meaning |") + 2
    rows = lines[first : lines.index("", first)]
    cells = (row.split("|")[1] for row in rows)
    return {name for cell in cells for name in re.findall(r"`([A-Z0-9_]+)(?:=\w+)?`", cell)}


def test_every_variable_is_on_the_page() -> None:
    read, named = all_read(), named_on_the_page()
    assert {"CXX", "CONMOE_OPERATOR_AWAKE", "CUDA_VISIBLE_DEVICES"} <= read  # the search finds
    assert read - named == NOT_FOR_USERS.keys()


def test_what_is_on_the_page_of_ours_is_read() -> None:
    ours = {one for one in named_on_the_page() if one.startswith("CONMOE_")}
    assert ours and ours <= all_read()


@pytest.mark.parametrize(
    "source",
    [
        "os.environ.get('A_B')",
        "os.environ['A_B']",
        "os.getenv('A_B', '')",
        "'A_B' in os.environ",
        "os.environ.setdefault('A_B', '1')",
        "NAME = 'A_B'\nos.environ.get(NAME)",
        "os.environ.get(ELSEWHERE)",
        "WANTED = ('A_B',)\nfor one in WANTED:\n    os.environ.get(one)",
        "for one in (ELSEWHERE,):\n    one in os.environ",
    ],
)
def test_a_variable_is_found(source: str) -> None:
    assert read_by(source, {"ELSEWHERE": "A_B"}) == {"A_B"}


@pytest.mark.parametrize("source", ["os.environ['A_B'] = '1'", "settings.get('A_B')", "x = 'A_B'"])
def test_what_is_no_reading_is_left_alone(source: str) -> None:
    assert read_by(source, {}) == set()
