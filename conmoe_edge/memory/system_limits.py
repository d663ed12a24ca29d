"""What a system lets a process have of the RAM that is free: policies on figures, and the few figures that psutil
does not read.

========  =======================================  ====================================================
system    RAM that can be had                      page-locked for a GPU's copies
========  =======================================  ====================================================
Linux     what the kernel calls available          what can be had: the driver pins past ``ulimit -l``
macOS     free and inactive pages, as psutil       no such GPU; what an Apple GPU may wire is its
          counts; pages beyond that are            device memory (``model/accelerator.py``)
          compressed or swapped, not given
Windows   free RAM, but no more than is left of    half of the RAM, where Windows draws the line for
          the commit limit (RAM and page file)     memory that a GPU shares
========  =======================================  ====================================================

A process on Windows gets ``MemoryError`` at the commit limit though RAM is free, since untouched memory counts there;
on Linux and macOS it is given and runs out when it is written to. No torch. Peak memory: nothing.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from conmoe_edge.system_calls import system_name

_WINDOWS_PINNED_SHARE = 0.5


def obtainable(system: str, available: int, commit_left: int | None) -> int:
    """Bytes that a process can have now.

    Args:
        system: ``linux``, ``darwin``, ``windows``.
        available: free RAM, as psutil says.
        commit_left: what is left of Windows' commit limit; ``None`` where there is none or it cannot be read.
    """
    if system == "windows" and commit_left is not None:
        return min(available, commit_left)
    return available


def lockable(system: str, total: int, obtainable_now: int) -> int:
    """Bytes of RAM, of ``total``, that may be page-locked for the copies of a GPU of its own memory."""
    if system == "windows":
        return min(obtainable_now, int(total * _WINDOWS_PINNED_SHARE))
    return 0 if system == "darwin" else obtainable_now


class _MemoryStatus(ctypes.Structure):
    """``MEMORYSTATUSEX`` of Windows."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *[
            (name, ctypes.c_uint64)
            for name in (
                *("total_physical", "free_physical", "commit_limit", "commit_left"),
                *("total_virtual", "free_virtual", "free_extended"),
            )
        ],
    ]


def commit_left() -> int | None:
    """Bytes that this process may still commit on Windows; ``None`` elsewhere, and where it does not say."""
    if system_name() != "windows" or os.name != "nt":
        return None
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    kernel: Any = ctypes.windll.kernel32  # pyright: ignore[reportAttributeAccessIssue]
    return status.commit_left if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None
