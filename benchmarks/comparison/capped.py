"""Run a command under a hard memory cap that counts the page cache, without swap, for a limited time.

A memory cgroup is made where this user may make one (version 1 or 2, usually as root); otherwise
``systemd-run --scope`` makes it. Where neither works, a cap is refused, and an uncapped command
runs as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import cgroup_peak, memory_cgroup

_SWAP_LIMITS = (("memory.memsw.limit_in_bytes", None), ("memory.swap.max", "0"))
_TAIL = 2000


@dataclass(frozen=True, slots=True)
class Capped:
    """What became of a command.

    Attributes:
        peak: most bytes charged to its cgroup; ``None`` where only the command itself can tell.
        out_of_memory: the kernel killed it for memory, or its own words say so.
        how: ``cgroup``, ``systemd-run`` or ``no cgroup``.
        tail: the end of what it wrote.
    """

    returncode: int
    seconds: float
    peak: int | None
    out_of_memory: bool
    timed_out: bool
    how: str
    tail: str


def run_capped(
    command: Sequence[str], cap: int | None, seconds: float, environment: Mapping[str, str]
) -> Capped:
    """Run ``command`` with at most ``cap`` bytes for at most ``seconds``.

    Raises:
        RuntimeError: a cap was asked for and cannot be enforced here.
    """
    with memory_cgroup(cap) as group:
        if group is not None:
            _no_swap(group, cap)
            join = f'echo $$ > "{group / "cgroup.procs"}" && exec "$@"'
            inside, how = ["/bin/sh", "-c", join, "sh", *command], "cgroup"
        elif shutil.which("systemd-run"):
            inside, how = [*_scope(cap), *command], "systemd-run"
        elif cap is None:
            inside, how = list(command), "no cgroup"
        else:
            raise RuntimeError(
                "a memory cap needs a cgroup that this user may write, or systemd-run"
            )
        with tempfile.TemporaryFile() as out:
            start = time.perf_counter()
            process = subprocess.Popen(
                inside, stdout=out, stderr=out, env=dict(environment), start_new_session=True
            )
            timed_out = False
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            spent = time.perf_counter() - start
            out.seek(0)
            text = out.read().decode(errors="replace")
        killed = process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL) and not timed_out
        return Capped(
            returncode=process.returncode,
            seconds=spent,
            peak=cgroup_peak(group),
            out_of_memory=killed or _oom_kills(group) > 0 or says_out_of_memory(text),
            timed_out=timed_out,
            how=how,
            tail=text[-_TAIL:],
        )


def says_out_of_memory(text: str) -> bool:
    """Whether a program's last words are that it could not get memory."""
    end = text[-_TAIL:].lower()
    words = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "memoryerror")
    return any(word in end for word in words)


def _no_swap(group: Path, cap: int | None) -> None:
    for name, value in _SWAP_LIMITS:
        if cap is not None and (group / name).exists():
            (group / name).write_text(value or str(cap))


def _scope(cap: int | None) -> list[str]:
    command = ["systemd-run", "--scope", "--quiet", "-p", "MemorySwapMax=0"]
    if os.getuid() != 0:
        command.insert(1, "--user")
    if cap is not None:
        command += ["-p", f"MemoryMax={cap}"]
    return [*command, "--"]


def _oom_kills(group: Path | None) -> int:
    """Processes that the kernel killed in this cgroup."""
    for name in ("memory.oom_control", "memory.events"):
        with contextlib.suppress(OSError):
            if group is not None:
                for line in (group / name).read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
    return 0
