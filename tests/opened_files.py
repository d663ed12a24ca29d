"""Whether anybody opened a file, compiled libraries included: the kernel says so (inotify)."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

_OPENED = 0x20


@contextmanager
def never_opened(files: Sequence[Path]) -> Iterator[None]:
    """Fail where one of ``files`` is opened inside the block, under whatever name."""
    if not sys.platform.startswith("linux"):
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert handle >= 0, os.strerror(ctypes.get_errno())
    try:
        for path in files:
            watch = libc.inotify_add_watch(handle, os.fsencode(path), _OPENED)
            assert watch >= 0, os.strerror(ctypes.get_errno())
        yield
        try:
            events = os.read(handle, 1 << 16)
        except BlockingIOError:
            events = b""
        if events:
            pytest.fail(f"one of {[path.name for path in files]} was opened")
    finally:
        os.close(handle)
