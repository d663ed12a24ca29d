"""Keep freed memory from staying with the process where the budget is about RAM.

glibc keeps freed blocks of some megabytes in a heap that breaks into pieces, so that resident
memory runs ahead of what is in use, by some hundred MB for a key-value cache that grows, by more
than a GiB for layers that come and go. Four remedies, each for its place: ``return_large_blocks``
for a process that chats, where large blocks are rare; ``trim_heap`` between two layers of a fit,
where they are frequent and each would cost its page faults; ``trimmed`` between the experts of one.
A server, whose texts are tokenised on another thread than its answers are made on, keeps both in
``one_heap``. Elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import psutil

One = TypeVar("One")

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_THRESHOLD = 1 << 20
GROWN = 96 << 20
"""Bytes by which a process grows before ``trimmed`` gives back what is free in its heap."""


def return_large_blocks() -> bool:
    """Have blocks of a MiB and more mapped on their own and given back when they are freed; says
    whether the C library can do that.
    """
    return _call("mallopt", _M_MMAP_THRESHOLD, _THRESHOLD)


def one_heap() -> bool:
    """Have threads that are started from now on share the main heap, so that what one of them has freed serves the
    others; says whether the C library can do that. For a process whose threads rarely allocate at the same time.
    """
    return _call("mallopt", _M_ARENA_MAX, 1)


def trim_heap() -> bool:
    """Give back what is free in the heap now; says whether there was any."""
    return _call("malloc_trim", 0)


def trimmed(items: Iterable[One]) -> Iterator[One]:
    """Each of ``items``, the heap looked at before it (``Trimming``)."""
    trimming = Trimming()
    for one in items:
        trimming.look()
        yield one


class Trimming:
    """For loops whose every step leaves something behind and needs a multiple of it for a while: what it needs for a
    while is free again in pieces between what stays, and the next step, a little larger, finds room behind them.
    """

    def __init__(self) -> None:
        self._process, self._least = psutil.Process(), 0
        self._lock = threading.Lock()

    def look(self) -> None:
        """Trim the heap the first time, and wherever the process has grown by ``GROWN`` since that was done last."""
        with self._lock:
            now = self._process.memory_info().rss
            if now > self._least + GROWN:
                trim_heap()
                self._least = self._process.memory_info().rss
            self._least = min(self._least, now)


def _call(name: str, *args: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        function: Any = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library, without such a call
        return False
    return bool(function(*args))
