"""Names that a system lacks, in source text: where they are used without a question for the system before, and which
test functions cannot run there because of them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from names_of_systems import MODULES_NOT_ON_WINDOWS, NOT_ON_MACOS, NOT_ON_WINDOWS

_TABLES = {"windows": NOT_ON_WINDOWS, "darwin": NOT_ON_MACOS}
ABSENT = {
    f"{module}.{name}"
    for table in _TABLES.values()
    for module, names in table.items()
    for name in names.split()
}
QUESTIONS = ("os.name", "sys.platform", "platform.system", "hasattr", "getattr", "_POSIX")
"""What a condition asks when it asks for the system."""


def _asks(node: ast.AST) -> bool:
    text = ast.unparse(node)
    return any(word in text for word in QUESTIONS)


def _leaves(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], ast.Return | ast.Raise | ast.Continue)


def uses(source: str) -> list[tuple[int, str]]:
    """(line, name) of what Windows or macOS lacks, used without a question for the system before it."""
    tree = ast.parse(source)
    above: dict[ast.AST, ast.AST] = {
        child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)
    }

    def asked(node: ast.AST) -> bool:
        inner: ast.AST = node
        while inner in above:
            outer = above[inner]
            if (
                isinstance(outer, ast.If | ast.IfExp)
                and inner is not outer.test
                and _asks(outer.test)
            ):
                return True
            if isinstance(outer, ast.BoolOp) and any(
                _asks(value)
                for value in outer.values[: outer.values.index(inner)]  # type: ignore[arg-type]
            ):
                return True
            if isinstance(outer, ast.Try) and inner in outer.body:
                caught = " ".join(ast.unparse(one.type) for one in outer.handlers if one.type)
                if "ImportError" in caught or "AttributeError" in caught:
                    return True
            if isinstance(outer, ast.With) and inner in outer.body:
                around = ast.unparse(outer.items[0].context_expr)
                if "suppress" in around and ("ImportError" in around or "AttributeError" in around):
                    return True
            for field in ("body", "orelse", "finalbody"):
                block = getattr(outer, field, None)
                if isinstance(block, list) and inner in block:
                    before = block[: block.index(inner)]
                    if any(
                        isinstance(one, ast.If) and _asks(one.test) and _leaves(one.body)
                        for one in before
                    ):
                        return True
            inner = outer
        return False

    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        elif isinstance(node, ast.Import):
            names = [one.name for one in node.names if one.name in MODULES_NOT_ON_WINDOWS]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{one.name}" for one in node.names]
            names += [node.module] * (node.module in MODULES_NOT_ON_WINDOWS)
        elif isinstance(node, ast.keyword) and node.arg in ("start_new_session", "preexec_fn"):
            names = [node.arg] if node.arg == "preexec_fn" else []
        for name in names:
            known = name in ABSENT or name in MODULES_NOT_ON_WINDOWS or name == "preexec_fn"
            if known and not asked(node):
                found.append((getattr(node, "lineno", 0), name))
    return found


def _lacks(name: str, system: str) -> bool:
    module, _, attribute = name.partition(".")
    if name in MODULES_NOT_ON_WINDOWS:
        return system == "windows"
    return attribute in _TABLES[system].get(module, "").split()


@cache
def needs_of(path: Path, system: str) -> dict[str, str]:
    """Functions of a test file that use what ``system`` lacks, themselves or by another one, each with a name of that;
    under an empty name what the file itself or a helper that it imports uses when it is imported.
    """
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = [(line, name) for line, name in uses(source) if _lacks(name, system)]
    found: dict[str, str] = {}
    for node in tree.body:
        end = node.end_lineno or node.lineno
        inside = [name for line, name in lines if node.lineno <= line <= end]
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named:
            start = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            at_import = [name for line, name in lines if start <= line < node.lineno]
            if at_import:
                found[""] = at_import[0]
        if inside:
            found[node.name if named else ""] = inside[0]
        for helper in _helpers(node, path):
            theirs = needs_of(helper, system)
            names = [one.name for one in getattr(node, "names", ())]
            found.update({name: theirs[name] for name in ["", *names] if name in theirs})
    grown = 0
    while grown < len(found):  # who calls one of these
        grown = len(found)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in found:
                called = [one.id for one in ast.walk(node) if isinstance(one, ast.Name)]
                called += [one.arg for one in ast.walk(node) if isinstance(one, ast.arg)]
                known = [found[one] for one in called if one and one in found]
                if known:
                    found[node.name] = known[0]
    return found


def _helpers(node: ast.stmt, path: Path) -> Iterator[Path]:
    """Files of the tests that a statement imports."""
    if not isinstance(node, ast.ImportFrom) or not node.module:
        return
    pieces = node.module.split(".")
    root = Path(__file__).resolve().parent
    for folder in (root.parent, root, root / "cli"):
        found = folder.joinpath(*pieces).with_suffix(".py")
        if found.is_file() and found != path and root in found.parents:
            yield found
