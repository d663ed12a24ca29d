"""The self test of a library in a process of its own: what crashes there does not crash here.

A library that was miscompiled, or that computes otherwise than this processor does, may crash in its self test
(``self_test.py``). What the test gave is written into the user's cache under the library's digest, so that one that
crashed is not opened at the next start either.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from conmoe_edge.offload.kernels.cpu.library_files import TRIED, is_own, write_beside
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

_WRONG = 3
_TRY = f"""
import ctypes, sys
from conmoe_edge.offload.kernels.cpu.operator import Operator
from conmoe_edge.offload.kernels.cpu.self_test import check
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable
try:
    check(Operator(ctypes.CDLL(sys.argv[1])))
except (Unavailable, OSError, AttributeError) as error:
    print(error)
    raise SystemExit({_WRONG})
"""


def told_of(path: Path, folder: Path) -> Path:
    """The file in ``folder`` that says what the test of the library at ``path`` gave."""
    return folder / f"{path.stem.rpartition('-')[2]}{TRIED}"


def try_apart(path: Path, folder: Path | None, seconds: int) -> None:
    """Test the library at ``path``, unless ``folder`` says what came of it earlier; ``None`` says nothing.

    Raises:
        Unavailable: it has crashed, or computes wrongly; also where that was found earlier.
    """
    told = None if folder is None else told_of(path, folder)
    if told is not None and is_own(told):
        reason = told.read_text("utf-8", "replace")
        if reason:
            raise Unavailable(f"{reason} (remove {told} to try again)")
        return
    reason = self_test(path, seconds)
    if told is not None:
        with contextlib.suppress(OSError):  # it is tried again at the next start then
            write_beside(told, reason)
    if reason:
        raise Unavailable(reason)


def self_test(path: Path, seconds: int) -> str:
    """What is wrong with the library; empty where nothing is.

    Raises:
        Unavailable: that cannot be found out now.
    """
    # The same modules as here, and none from the folder in which this runs.
    modules = os.pathsep.join(one for one in sys.path if one)
    command = [sys.executable, "-P", "-c", _TRY, str(path)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": modules},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the compiled operator could not be tried: {error}") from error
    return _reason(done)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the compiled operator crashes (signal {-done.returncode})"
    if done.returncode & 0xC0000000 == 0xC0000000:  # Windows gives the exception instead
        return f"the compiled operator crashes (exception {done.returncode:#x})"
    if done.returncode == _WRONG:
        return done.stdout.strip()[:300] or "the compiled operator is wrong"
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise Unavailable(f"the compiled operator could not be tried: {last[:200]}")
    return ""
