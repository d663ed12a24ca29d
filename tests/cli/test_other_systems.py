"""The package on Windows and macOS, as far as Linux can show it: names that they lack are used nowhere unasked, and
without them every module is imported and the main commands run.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from names_of_systems import MODULES_NOT_ON_WINDOWS, NOT_ON_MACOS, NOT_ON_WINDOWS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "conmoe_edge"
SOURCES = sorted(PACKAGE.rglob("*.py"))

ABSENT = {
    f"{module}.{name}"
    for table in (NOT_ON_WINDOWS, NOT_ON_MACOS)
    for module, names in table.items()
    for name in names.split()
}
QUESTIONS = ("os.name", "sys.platform", "platform.system", "hasattr", "getattr")
"""What a condition asks when it asks for the system."""

ELSEWHERE: dict[tuple[str, str], str] = {
    ("offload/storage/slot_pool.py", "mmap.MADV_DONTNEED"): "behind can_shrink, which is for Linux",
}
"""(file, name): why it needs no question."""
COMPILING = "offload/kernels/cpu/"
"""What compiles the operator asks for the system once, before all of it."""


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


def test_nothing_that_a_system_lacks_is_used_unasked() -> None:
    found = {}
    for path in SOURCES:
        name = path.relative_to(PACKAGE).as_posix()
        mine = uses(path.read_text(encoding="utf-8"))
        left = [one for one in mine if (name, one[1]) not in ELSEWHERE]
        if left and not name.startswith(COMPILING):
            found[name] = left
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.fork()",
        "import fcntl",
        "from os import posix_fadvise",
        "import os\nos.open('x', os.O_DIRECT)",
        "import signal\nsignal.SIGKILL",
        "import os\nif os.path:\n    os.geteuid()",
        "import os\nif os.name == 'nt':\n    pass\nos.killpg(1, 9)",
        "import subprocess\nsubprocess.Popen([], preexec_fn=print)",
    ],
)
def test_what_is_used_unasked_is_found(source: str) -> None:
    assert uses(source)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nif hasattr(os, 'fork'):\n    os.fork()",
        "import os\nx = os.O_DIRECT if hasattr(os, 'O_DIRECT') else 0",
        "try:\n    import fcntl\nexcept ImportError:\n    pass",
        "import os\ndef f():\n    if os.name != 'posix':\n        return\n    os.geteuid()",
        "import os\nos.replace('a', 'b')",
    ],
)
def test_what_is_asked_for_first_is_not(source: str) -> None:
    assert not uses(source)


def without_encoding(source: str) -> list[int]:
    """Lines where text is read or written in whatever encoding the system has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        given = {one.arg for one in node.keywords}
        texts = [one.value for one in node.args if isinstance(one, ast.Constant)]
        modes = [one for one in texts if isinstance(one, str) and 0 < len(one) <= 3]
        modes += [
            str(one.value.value)
            for one in node.keywords
            if one.arg == "mode" and isinstance(one.value, ast.Constant)
        ]
        binary = any("b" in one for one in modes)
        plain = {"read_text": 1, "write_text": 2}.get(name)
        if plain is not None and "encoding" not in given and len(node.args) < plain:
            found.append(node.lineno)
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        opens = (name in ("open", "fdopen") and owner != "os") or name == "fdopen"
        opens = opens and not owner.endswith(("webbrowser", "Index", "Image"))
        if (
            opens
            and not binary
            and "encoding" not in given
            and (owner in ("", "os", "io") or modes)
        ):
            found.append(node.lineno)
        if name in ("run", "Popen", "check_output") and "text" in given and "encoding" not in given:
            found.append(node.lineno)
    return found


def test_text_files_say_their_encoding() -> None:
    found = {
        name: lines
        for path in SOURCES
        if not (name := path.relative_to(PACKAGE).as_posix()).startswith(COMPILING)
        and (lines := without_encoding(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_a_file_without_an_encoding_is_found() -> None:
    for call in (
        "open('a')",
        "open('a', 'w')",
        "p.read_text()",
        "p.write_text('a')",
        "p.open('w')",
    ):
        assert without_encoding(call), call
    for call in ("open('a', 'rb')", "p.read_text('utf-8')", "p.open('wb')", "os.open('a', 0)"):
        assert not without_encoding(call), call


@pytest.mark.parametrize("system", ["windows", "darwin"])
def test_every_module_and_the_main_commands_without_what_a_system_lacks(
    system: str, model: Path, text: Path, tmp_path: Path
) -> None:
    folders = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cli")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    environment.update(CONMOE_CACHE_DIR=str(tmp_path / "cache"), CONMOE_CONFIG_DIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "other_systems", system, str(model), str(text), str(tmp_path)],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answer '" in done.stdout
    modules = int(done.stdout.split()[0])
    assert modules > 300
    direct = "F_NOCACHE" if system == "darwin" else "buffered"
    assert direct in done.stdout or system == "darwin"
