"""What a command changes: its output, and the folders of its user that the documentation names. It opens no socket for
what lies on this disk, with no flag to forbid it, leaves no process and no temporary file, and prints one JSON value
on stdout, whatever libraries say there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from every_command import FAILS, FROM_A_HUB, WORKS, commands, noise, value_of, words_of
from forked import FORK, Sandbox, command

pytestmark = pytest.mark.skipif(
    FORK is None, reason="the tests fork, so that torch is imported once"
)

CHANGES: dict[str, tuple[str, ...]] = {
    "fit": ("new",),
    "run": ("box/home/.local/share/conmoe-edge",),
    "inspect": ("new",),
    "export": ("new",),
    "models alias": ("box/home/.config/conmoe-edge",),
    "models unalias": ("box/home/.config/conmoe-edge",),
    "completion install": (
        "box/home/.local/share/bash-completion/completions/conmoe-edge",
        "box/home/.bashrc",
    ),
}
"""Command -> where it may write, below the test's own folder. The others write nowhere."""

_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def snapshot(*roots: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below: kind, size, time of change, content."""
    found: dict[str, tuple[Any, ...]] = {}
    for root in roots:
        for path in [root, *root.rglob("*")]:
            info = path.lstat()
            kind = stat.S_IFMT(info.st_mode)
            content = ""
            if stat.S_ISREG(info.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            # A folder's time changes with what comes and goes in it, which is looked at by name.
            when = 0 if stat.S_ISDIR(info.st_mode) else info.st_mtime_ns
            found[str(path)] = (kind, info.st_mode, content, when)
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def watched(log: Path) -> Callable[[], None]:
    """Refuses every way to the network and writes it down; the hub is not told to stay offline."""

    def first() -> None:
        import huggingface_hub.constants as hub

        hub.HF_HUB_OFFLINE = False
        noise()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in _NETWORK and event != "socket.bind":
                return
            where = arguments[1:] if event in ("socket.connect", "socket.bind") else arguments
            with log.open("a") as file:
                file.write(f"{event} {where}\n")
            # An address in digits is looked up nowhere.
            if event != "socket.bind" and not (event.endswith("info") and where[0] == "127.0.0.1"):
                raise PermissionError(f"no network in this test: {event}")

        sys.addaudithook(hook)

    return first


def left_running(root: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.environ().get("TMPDIR", "").startswith(str(root)):
                found.append(f"{process.pid} {process.info['cmdline']}")
        except psutil.Error:
            continue
    return found


@pytest.fixture
def places(model: Path, text: Path, package: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "model": model,
        "text": text,
        "package": package,
        "new": tmp_path / "new",
        "nowhere": tmp_path / "nowhere",
    }


ONLINE = {"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}


@pytest.mark.parametrize("name", [one for one in commands() if one not in FROM_A_HUB])
def test_when_it_works(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    sandbox, log = Sandbox(tmp_path / "box").made(), tmp_path / "sockets"
    if name == "models unalias":
        command(*words_of("models alias", WORKS, places), sandbox=sandbox)
    roots = (tmp_path, places["model"].parent, places["package"].parent, places["text"].parent)
    before = snapshot(*roots)
    done = command(
        *words_of(name, WORKS, places),
        "--json",
        sandbox=sandbox,
        more=ONLINE,
        first=watched(log),
        interrupt_on='"api"' if name == "serve" else "",
    )
    assert done.status == 0 or name == "doctor", done.stderr
    value = value_of(done)
    assert "error" not in value and len(value) > 1
    assert "a library in C says hello" in done.stderr and "a child says hello" in done.stderr
    sockets = log.read_text().splitlines() if log.exists() else []
    if name == "serve":
        assert sum(line.startswith("socket.bind (('127.0.0.1',") for line in sockets) == 1
        assert all(
            line.startswith(("socket.bind", "socket.getaddrinfo ('127.0.0.1',")) for line in sockets
        )
        assert len(sockets) <= 2
    else:
        assert sockets == []
    log.unlink(missing_ok=True)
    allowed = tuple(str(tmp_path / one) for one in CHANGES.get(name, ()))
    parents = {str(one) for path in allowed for one in Path(path).parents}
    wrong = {
        path
        for path in changed(before, snapshot(*roots))
        if not path.startswith(allowed or ("\0",)) and path not in parents
    }
    assert wrong == set()
    assert list(sandbox.temporary.iterdir()) == []
    assert left_running(tmp_path) == []


@pytest.mark.parametrize("name", commands())
def test_when_it_fails(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    sandbox, log = Sandbox(tmp_path / "box").made(), tmp_path / "sockets"
    roots = (tmp_path, places["model"].parent, places["package"].parent)
    before = snapshot(*roots)
    done = command(
        *words_of(name, FAILS, places), "--json", sandbox=sandbox, more=ONLINE, first=watched(log)
    )
    error = value_of(done)["error"]
    assert set(error) == {"type", "what", "why", "fix"} and error["what"]
    assert done.status in (1, 2, 3) and "Traceback" not in done.stderr
    assert changed(before, snapshot(*roots)) == set()
    assert left_running(tmp_path) == []


def _corrupt(places: dict[str, Path]) -> None:
    folder = shutil.copytree(places["model"], places["new"].parent / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    places["model"] = folder


def _binary(places: dict[str, Path]) -> None:
    places["text"] = places["new"].parent / "text.bin"
    places["text"].write_bytes(b"\xff\xfe\x00" * 100)


def _in_the_way(places: dict[str, Path]) -> None:
    (places["new"].parent / "file").write_text("mine")
    places["new"] = places["new"].parent / "file" / "out"


def _other_folder(places: dict[str, Path]) -> None:
    places["new"].mkdir()
    (places["new"] / "thesis.tex").write_text("years of work")


@pytest.mark.parametrize(
    ("spoil", "more"),
    [
        (_corrupt, ()),
        (_binary, ()),
        (_in_the_way, ()),
        (_other_folder, ()),
        (_other_folder, ("--overwrite",)),
        (lambda places: None, ("--gpu", "1MB")),
        (lambda places: None, ("--method", "no-such-method")),
        (lambda places: None, ("--context", "100000")),
        (lambda places: None, ("--method", "reap", "--rate", "0.99")),
    ],
    ids=[
        "weights",
        "text",
        "a file",
        "a folder",
        "overwrite",
        "budget",
        "method",
        "context",
        "rate",
    ],
)
def test_a_fit_that_fails_leaves_nothing(
    spoil: Callable[[dict[str, Path]], None],
    more: tuple[str, ...],
    places: dict[str, Path],
    tmp_path: Path,
) -> None:
    spoil(places)
    sandbox = Sandbox(tmp_path / "box").made()
    before = snapshot(tmp_path, places["model"])
    done = command(*words_of("fit", WORKS, places), *more, sandbox=sandbox)
    assert done.status in (1, 2, 3), done.stderr
    assert changed(before, snapshot(tmp_path, places["model"])) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fit", "chat", "eval", "doctor", "export"])
def test_in_a_process_of_its_own(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    """What is done while modules are imported shows only here."""
    import subprocess

    sandbox = Sandbox(tmp_path / "box").made()
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        f"names = {_NETWORK!r}\n"
        "def hook(event, arguments):\n"
        "    if event in names: raise PermissionError('no network in this test: ' + event)\n"
        "sys.addaudithook(hook)\n"
    )
    before = snapshot(tmp_path)
    environment = {**os.environ, **{k: v for k, v in sandbox.environment.items() if v}}
    environment["PYTHONPATH"] = os.pathsep.join([str(hook), *sys.path])
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-m", "conmoe_edge.cli.main", *words_of(name, WORKS, places)],
        cwd=sandbox.here,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0 or name == "doctor", done.stderr
    assert "no network" not in done.stderr
    new = str(places["new"])
    assert {p for p in changed(before, snapshot(tmp_path)) if not p.startswith(new)} == set()
