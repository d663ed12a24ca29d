"""The only functions that make a change on disk permanent: ``fsync_file``, ``fsync_folder``,
``replace``, ``remove_tree``.

Everything that must survive a power cut or ``kill -9`` goes through them, so that a test can stop
the process at each such step: with ``CONMOE_CRASH_AT=n`` in the environment the n-th durable step
(counted from 1, over the whole process) is not done, and the process leaves at once with status
137, as if it had been killed right before.

Raises whatever the operating system raises (``OSError``); ``disk.disk_errors`` turns that into the
package's errors.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

CRASH_VARIABLE = "CONMOE_CRASH_AT"
CRASH_STATUS = 137
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds between the tries on Windows."""

# A counter has to live as long as the process, since the crash tests count the steps of a whole
# run. Nothing reads it unless the variable is set.
_steps = itertools.count(1)


def _step() -> None:
    wanted = os.environ.get(CRASH_VARIABLE)
    if wanted and next(_steps) == int(wanted):
        os._exit(CRASH_STATUS)


def fsync_file(path: Path) -> None:
    """Wait until the content of ``path`` is on the disk."""
    _step()
    # Windows flushes only what was opened for writing; elsewhere reading is enough, and works on
    # read-only files too.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Wait until the names in ``path`` are on the disk. Windows has no such call and needs none."""
    _step()
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target`` in one step that other processes see whole or not at all;
    then sync the names.
    """
    _step()
    _patiently(lambda: source.replace(target))
    fsync_folder(target.parent)
    if source.parent != target.parent:
        fsync_folder(source.parent)


def remove_tree(path: Path) -> None:
    """Delete a folder and what is in it. Not atomic: callers rely on nothing inside a folder that
    they delete.
    """
    _step()
    _patiently(lambda: shutil.rmtree(path))


def waits_for_others() -> bool:
    """Whether this system refuses to rename and delete what is open."""
    return os.name == "nt"


def _patiently(act: Callable[[], object]) -> None:
    """On Windows nothing can be renamed or deleted while a program has it open, and indexers and virus scanners open
    what is new for a moment: so it is tried for a second and a half. Elsewhere once.
    """
    for wait in _PAUSES if waits_for_others() else ():
        try:
            act()
        except PermissionError:
            time.sleep(wait)
        else:
            return
    act()
