"""Calls of the operating system that Windows or macOS does not have, each with what stands in for it there.

======================  ====================  ==========================  ==========================================
what                    Linux                 macOS                       Windows
======================  ====================  ==========================  ==========================================
reads at a position     ``preadv``            ``preadv``                  seek and read, one reader of a file at a time
reads past the cache    ``O_DIRECT``          ``F_NOCACHE``               none: buffered
dropping from a cache   ``posix_fadvise``     none: the pages stay        none: the pages stay
processors allowed      ``sched_getaffinity`` all                         all
a file's owner          ``geteuid``           ``geteuid``                 not asked: the folder's own rights hold
======================  ====================  ==========================  ==========================================

``tests/cli/test_other_systems.py`` refuses such names anywhere else, but behind a question for the system.
What is missing changes speed, never a byte. No state; peak memory: nothing.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import threading
from contextlib import suppress
from typing import Any, Literal

fcntl: Any
try:
    import fcntl
except ImportError:
    fcntl = None

DirectWay = Literal["O_DIRECT", "F_NOCACHE", ""]

FOREIGN_FILE = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
"""Flags for opening a file that is not ours: no link in its last place, no waiting for a pipe, bytes as they are."""


def read_at(handle: int, buffer: memoryview, offset: int, lock: threading.Lock) -> int:
    """Read into ``buffer`` from byte ``offset`` on: how many bytes came, 0 at the end of the file.

    Where the system reads at the cursor only, it is moved and read under ``lock``, which all readers of ``handle``
    have to share.
    """
    if hasattr(os, "preadv"):
        return os.preadv(handle, [buffer], offset)
    with lock, io.FileIO(handle, "rb", closefd=False) as file:
        file.seek(offset)
        return file.readinto(buffer)


def drop_from_cache(handle: int, offset: int = 0, nbytes: int = 0) -> bool:
    """Tell the system not to keep this part of a file (0: to its end) in its page cache; whether it can be told."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)
    return True


def expect_random_reads(handle: int) -> None:
    """Tell the system not to read ahead, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)


def direct_way() -> DirectWay:
    """How this system reads past its page cache; empty where it does not, and reads are buffered."""
    if hasattr(os, "O_DIRECT") and hasattr(os, "preadv"):
        return "O_DIRECT"
    return "F_NOCACHE" if _no_cache() is not None else ""


def direct_flag() -> int:
    """What is added to the flags of ``os.open`` for direct reads; 0 where nothing is."""
    return getattr(os, "O_DIRECT", 0)


def leave_the_cache(handle: int) -> None:
    """Have an open file read past the page cache where that is said after opening it (macOS); else nothing.

    Raises:
        OSError: the file system refuses.
    """
    command = _no_cache()
    if command is not None and fcntl is not None:
        fcntl.fcntl(handle, command, 1)


def _no_cache() -> int | None:
    return None if fcntl is None else getattr(fcntl, "F_NOCACHE", None)


def opened_directly(handle: int) -> int | None:
    """A second descriptor of an open file for direct reads, which the caller closes; ``None`` where there is none."""
    with suppress(OSError):
        if hasattr(os, "O_DIRECT"):
            return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_DIRECT)
        if _no_cache() is not None:
            second = os.dup(handle)
            try:
                leave_the_cache(second)
            except OSError:
                os.close(second)
                raise
            return second
    return None


def allowed_processors() -> int | None:
    """Processors that this process may use; ``None`` where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def others_may_write(info: os.stat_result) -> bool:
    """Whether a file or folder is another user's, or others may write to it. Where rights are no such bits (Windows)
    nothing is known, and it counts as private.
    """
    if not hasattr(os, "geteuid"):
        return False
    shared = bool(info.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    return info.st_uid != os.geteuid() or shared


def system_name() -> str:
    """``linux``, ``darwin``, ``windows``, or what Python calls another one."""
    for name in ("linux", "darwin"):
        if sys.platform.startswith(name):
            return name
    return "windows" if sys.platform == "win32" else sys.platform
