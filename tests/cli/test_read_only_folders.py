"""Folders that may be read and not written: of the model, of the package, of the user. Everything that only reads
works, and what has to write says so in three lines.

The tests may run as root, whom no mode stops; so the child gives up that privilege first.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
from pathlib import Path

import pytest
from every_command import WORKS, words_of
from forked import FORK, Done, Sandbox, command

pytestmark = pytest.mark.skipif(
    FORK is None or not sys.platform.startswith("linux"), reason="needs fork and capset"
)

READS = (
    *("chat", "fit", "export", "plan"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("bench", "eval", "serve", "doctor")),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("inspect", "models")),
)


def without_privilege() -> None:
    """Give up what lets root write where modes forbid it (``CAP_DAC_OVERRIDE`` and the like)."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Data(ctypes.Structure):
        _fields_ = (
            ("effective", ctypes.c_uint32),
            ("permitted", ctypes.c_uint32),
            ("inheritable", ctypes.c_uint32),
        )

    none = (Data * 2)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(ctypes.byref(Header(0x20080522, 0)), ctypes.byref(none)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def closed(folder: Path) -> Path:
    """The same folder, for reading only, with all that is in it."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


@pytest.fixture
def places(model: Path, text: Path, package: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "model": closed(shutil.copytree(model, tmp_path / "model")),
        "package": closed(shutil.copytree(package, tmp_path / "package")),
        "text": text,
        "new": tmp_path / "new",
    }


def run(name: str, places: dict[str, Path], box: Sandbox, **more: str | None) -> Done:
    return command(
        *words_of(name, WORKS, places),
        sandbox=box,
        more=more,
        first=without_privilege,
        interrupt_on="Serving" if name == "serve" else "",
    )


def test_the_modes_bind(tmp_path: Path) -> None:
    """Or the tests here would show nothing."""
    folder = closed(Sandbox(tmp_path / "box").made().here)
    done = command(
        *("completion", "install", "bash"),
        sandbox=Sandbox(tmp_path / "box"),
        more={"HOME": str(folder)},
        first=without_privilege,
    )
    assert done.status == 1 and "  fix:  " in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", READS)
def test_model_and_package_need_not_be_written(
    name: str, places: dict[str, Path], tmp_path: Path
) -> None:
    done = run(name, places, Sandbox(tmp_path / "box").made())
    assert done.status == 0 or name == "doctor", done.stderr


@pytest.mark.parametrize("name", READS)
def test_nor_the_folders_of_the_user(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    """No home, and files where folders should be."""
    sandbox = Sandbox(tmp_path / "box").made()
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "folder")
    done = run(
        name,
        places,
        sandbox,
        HOME=below,
        CONMOE_CONFIG_DIR=below,
        CONMOE_STATE_DIR=below,
        CONMOE_CACHE_DIR=below,
        XDG_CACHE_HOME=below,
    )
    assert done.status == 0 or name == "doctor", done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fit", ("--out", "{closed}/out")),
        ("export", ("{package}", "{closed}/out")),
        ("inspect", ("{package}", "--html", "{closed}/page.html")),
        ("bench", ("{package}", "--svg", "{closed}/speed.svg")),
        ("models alias", ("mine", "{model}")),
        ("completion install", ("bash",)),
    ],
)
def test_what_has_to_write_says_so(
    name: str, words: tuple[str, ...], places: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    closed(folder)
    kept = WORKS[name] if name in ("fit", "bench") else ()
    kept = tuple(word for word in kept if word not in ("--out", "{new}"))
    given = [word.format(closed=folder, **places) for word in (*kept, *words)]
    if name == "bench":
        given = given[len(given) - 3 :] + list(kept[1:])
    done = command(
        *name.split(),
        *given,
        sandbox=Sandbox(tmp_path / "box").made(),
        more={"HOME": str(folder), "CONMOE_CONFIG_DIR": str(folder / "config")},
        first=without_privilege,
    )
    assert done.status == 1
    lines = done.stderr.strip().splitlines()[-3:]
    assert any(line.startswith("error: ") for line in lines), done.stderr
    assert lines[-1].startswith("  fix:  ") and "--debug" not in lines[-1]
    assert list(folder.iterdir()) == []
