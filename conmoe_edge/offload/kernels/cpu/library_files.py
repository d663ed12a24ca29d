"""Compiled libraries as files: found under a name that says what they are, and only opened if they are that.

A library is called ``KEY-DIGEST.so``: ``KEY`` is a digest of what it was made from, ``DIGEST`` one of its content. One
that was cut off or changed has another digest than its name says; it is taken away and made anew.

In the user's cache a library counts only if nobody but the user (or root) can have written it, and so does its folder.
On Windows the folder is in the user's own profile, whose rights are inherited; there a library must be a plain file.

Memory: a library, while its digest is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path

from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

_POSIX = os.name == "posix"
_HEX = 32
TRIED = ".tried"
"""Suffix of the file that says what the test of a library gave (``tried_apart.py``)."""


def whole_library(folder: Path, key: str, suffix: str, *, ours: bool) -> Path | None:
    """A library of this key whose content is what its name says.

    Args:
        folder: where to look; it need not be there.
        key, suffix: first and last part of the name.
        ours: whether this is the user's cache: what others can have written does not count there and is taken away.
    """
    for path in sorted(folder.glob(f"{key}-*{suffix}")):
        if (not ours or is_own(path)) and content_digest(path) == path.stem.rpartition("-")[2]:
            return path
        if ours:
            with contextlib.suppress(OSError):  # as while another process has it open, on Windows
                path.unlink()
    return None


def put_library(built: Path, folder: Path, key: str, suffix: str) -> Path:
    """Move ``built`` into ``folder`` (on the same disk) under its name: whole or not at all, also where two processes
    do so at a time.
    """
    path = folder / f"{key}-{content_digest(built)}{suffix}"
    built.chmod(0o700)
    try:
        built.replace(path)
    except PermissionError:
        # Windows does not replace what is open. The name says that it is the same.
        if not path.is_file():
            raise
    return path


def content_digest(path: Path) -> str:
    """As it stands in the name of a library."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:_HEX]


def is_own(path: Path) -> bool:
    """Whether there is a plain file that nobody but the user and root can have written."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(info.st_mode) and _only_ours(info)


def _only_ours(info: os.stat_result) -> bool:
    if not _POSIX:
        return True
    return info.st_uid in (os.geteuid(), 0) and not info.st_mode & 0o022


def own_folder(folder: Path) -> None:
    """Make ``folder`` and the one above it; one that others may write, as where new folders are made for a group, is
    closed to them, and the libraries in it are taken away.

    Raises:
        Unavailable: one belongs to another user.
        OSError: one cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _POSIX:
        return
    for one in (folder.parent, folder):
        info = one.stat()
        if info.st_uid not in (os.geteuid(), 0):
            raise Unavailable(
                f"{one} belongs to another user (set XDG_CACHE_HOME to a folder of yours)"
            )
        if info.st_mode & 0o022:
            one.chmod(0o700)
            for found in one.iterdir():
                if found.suffix in (".so", ".dylib", TRIED):
                    found.unlink()


def write_beside(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all.

    Raises:
        OSError: that is not possible here.
    """
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)
