"""Free space and the errors of a disk, said in the package's own words. No state, no torch."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conmoe_edge.errors import ConmoeError, NoSpace
from conmoe_edge.units import human_size

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def existing_parent(path: Path) -> Path:
    """The deepest folder on the way to ``path`` that exists already."""
    here = path.absolute()
    while not here.is_dir() and here != here.parent:
        here = here.parent
    return here


def free_bytes(path: Path) -> int:
    """Bytes that may still be written on the disk that holds, or will hold, ``path``."""
    return shutil.disk_usage(existing_parent(path)).free


def require_space(path: Path, nbytes: int) -> None:
    """Refuse when the disk of ``path`` has less than ``nbytes`` free.

    Raises:
        NoSpace: with the needed and the free size.
    """
    free = free_bytes(path)
    if free < nbytes:
        raise NoSpace(
            f"The disk of {path} has too little free space.",
            f"{human_size(nbytes)} are needed, {human_size(free)} are free.",
            f"Free {human_size(nbytes - free)}, or choose a folder on another disk with --out.",
        )


_SHARING_VIOLATION, _LOCK_VIOLATION = 32, 33


def is_in_use(error: OSError) -> bool:
    """Whether Windows refuses because a program has the file open."""
    return getattr(error, "winerror", None) in (_SHARING_VIOLATION, _LOCK_VIOLATION)


ELSEWHERE = "Choose a folder that you may write to with --out."
"""What helps where the output of most commands cannot be written."""


@contextmanager
def disk_errors(path: Path, fix: str = ELSEWHERE) -> Iterator[None]:
    """Turn an ``OSError`` inside the block, which writes below ``path``, into ``NoSpace`` or
    ``ConmoeError``; the latter says ``fix``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace(
                f"The disk became full while {path} was written.",
                f"{human_size(free_bytes(path))} are free now.",
                "Free some space and run the same command again: it goes on where it stopped.",
            ) from error
        if is_in_use(error):
            raise ConmoeError(
                f"Cannot write {path}: a program has files of it open.",
                "Windows does not replace or delete what is open",
                "End what runs from there (chat, serve), and run the same command again.",
            ) from error
        raise ConmoeError(
            f"Cannot write {path}.",
            error.strerror or type(error).__name__,
            fix,
        ) from error
