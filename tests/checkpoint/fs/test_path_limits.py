"""Paths that Windows does not take, and files that it does not replace while they are open."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.checkpoint.fs.disk import disk_errors
from conmoe_edge.checkpoint.fs.path_limits import LONGEST_INSIDE, MOST, check_length
from conmoe_edge.errors import ConmoeError, UsageError

_FIRST = Path("C:/", "x" * (MOST - LONGEST_INSIDE - 3))


def test_a_folder_that_is_too_deep_for_windows_is_refused_before_the_work() -> None:
    check_length(_FIRST, "windows", long_paths=False)
    deeper = _FIRST.with_name(_FIRST.name + "abcd")
    with pytest.raises(UsageError, match="4 characters too many") as caught:
        check_length(deeper, "windows", long_paths=False)
    assert "LongPathsEnabled" in caught.value.fix and "--out" in caught.value.fix
    check_length(deeper, "windows", long_paths=True)
    check_length(deeper, "linux", long_paths=False)
    check_length(deeper, "darwin", long_paths=False)


class _Sharing(PermissionError):
    """What Windows raises where a program has a file open."""

    winerror = 32


def test_a_file_that_is_open_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_text("new", encoding="utf-8")
    tries = []
    right = Path.replace

    def busy(self: Path, other: Path) -> Path:
        tries.append(1)
        if len(tries) < 3:
            raise _Sharing(errno.EACCES, "used by another process")
        return right(self, other)

    monkeypatch.setattr(durable, "_PAUSES", (0.0,) * 5)
    monkeypatch.setattr(durable, "waits_for_others", lambda: True)
    monkeypatch.setattr(Path, "replace", busy)
    durable.replace(source, target)
    assert target.read_text(encoding="utf-8") == "new" and len(tries) == 3


def test_a_file_that_stays_open_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_PAUSES", (0.0,) * 2)
    monkeypatch.setattr(durable, "waits_for_others", lambda: True)

    def busy(self: Path, other: Path) -> Path:
        raise _Sharing(errno.EACCES, "used by another process")

    monkeypatch.setattr(Path, "replace", busy)
    said = pytest.raises(ConmoeError, match="a program has files of it open")
    with said as caught, disk_errors(tmp_path):
        durable.replace(tmp_path / "a", tmp_path / "b")
    assert "chat, serve" in caught.value.fix


@pytest.mark.skipif(sys.platform == "win32", reason="there it is tried again")
def test_elsewhere_a_refusal_is_one_at_once(tmp_path: Path) -> None:
    assert not durable.waits_for_others()
    with pytest.raises(FileNotFoundError):
        durable.replace(tmp_path / "a", tmp_path / "b")
