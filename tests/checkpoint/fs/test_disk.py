"""Free space is checked, and a full disk is said."""

from __future__ import annotations

import errno
from collections import namedtuple
from pathlib import Path

import pytest

from conmoe_edge.checkpoint.fs import disk
from conmoe_edge.errors import ConmoeError, NoSpace
from conmoe_edge.units import GIB

Usage = namedtuple("Usage", "total used free")


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(9 * GIB, 6 * GIB, 3 * GIB))
    disk.require_space(tmp_path / "not" / "there" / "yet", 3 * GIB)
    with pytest.raises(NoSpace) as caught:
        disk.require_space(tmp_path / "out", 8 * GIB)
    assert "8.00 GiB" in caught.value.why and "3.00 GiB" in caught.value.why
    assert "5.00 GiB" in caught.value.fix


def test_space_is_asked_of_the_disk_that_exists(tmp_path: Path) -> None:
    assert disk.existing_parent(tmp_path / "a" / "b") == tmp_path
    assert disk.free_bytes(tmp_path / "a") > 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_no_traceback(code: int, tmp_path: Path) -> None:
    with pytest.raises(NoSpace), disk.disk_errors(tmp_path):
        raise OSError(code, "full")


def test_other_errors_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ConmoeError, match="Permission denied"), disk.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
