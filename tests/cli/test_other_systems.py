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
from used_names import needs_of, uses

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "conmoe_edge"
SOURCES = sorted(PACKAGE.rglob("*.py"))

ELSEWHERE: dict[tuple[str, str], str] = {
    ("offload/storage/slot_pool.py", "mmap.MADV_DONTNEED"): "behind can_shrink, which is for Linux",
}
"""(file, name): why it needs no question."""


def test_nothing_that_a_system_lacks_is_used_unasked() -> None:
    found = {}
    for path in SOURCES:
        name = path.relative_to(PACKAGE).as_posix()
        mine = uses(path.read_text(encoding="utf-8"))
        left = [one for one in mine if (name, one[1]) not in ELSEWHERE]
        if left:
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
        path.relative_to(PACKAGE).as_posix(): lines
        for path in SOURCES
        if (lines := without_encoding(path.read_text(encoding="utf-8")))
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


@pytest.mark.parametrize("system", ["windows", pytest.param("darwin", marks=pytest.mark.slow)])
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
    # Linux' fcntl has no F_NOCACHE, so that neither of them reads directly here.
    assert "this system has no direct reads" in done.stdout


def test_tests_that_cannot_run_there_are_known_by_name() -> None:
    tests = ROOT / "tests"
    pipes = needs_of(tests / "checkpoint" / "fs" / "test_contained.py", "windows")
    assert pipes and set(pipes.values()) == {"os.mkfifo"} and "" not in pipes
    assert needs_of(tests / "checkpoint" / "fs" / "test_contained.py", "darwin") == {}
    terminal = tests / "cli" / "chat_loop" / "test_on_a_terminal.py"
    theirs = needs_of(terminal, "windows")
    assert {theirs[name] for name in theirs if name.startswith("test_")} == {"fcntl"}
    helper = tests / "fuzz" / "forked_command.py"
    users = [
        one
        for one in (tests / "fuzz").glob("test_*.py")
        if "from fuzz.forked_command import" in one.read_text("utf-8")
    ]
    assert needs_of(helper, "windows")[""] == "resource" and users
    assert all(needs_of(one, "windows")[""] for one in users)
