"""One command line in a forked process: bounded in time and memory, its screen and its sockets looked at."""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.patience import PATIENCE

SECONDS = 10
EXTRA_BYTES = 1 << 30
_DIED = 99


@dataclass(frozen=True)
class Outcome:
    """``status`` is the exit status, or minus the signal that ended the process."""

    status: int
    out: str
    err: str
    seconds: float
    sockets: str


def run_command(words: list[str], folder: Path) -> Outcome:
    """Run ``conmoe-edge WORDS`` in a child; ``folder`` is empty and takes its output.

    The child has ``SECONDS`` of CPU, ``PATIENCE`` of the clock, and ``EXTRA_BYTES`` of address space more
    than this process has.
    """
    files = {name: folder / name for name in ("out", "err", "sockets")}
    for path in files.values():
        path.touch()
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    gc.freeze()  # a collection in the child would copy every page of this process
    child = os.fork()
    if child == 0:
        _be_the_command(words, files)
    status = _wait(child, start)
    read = {name: path.read_bytes().decode("utf-8", "replace") for name, path in files.items()}
    return Outcome(status, read["out"], read["err"], time.monotonic() - start, read["sockets"])


def _wait(child: int, start: float) -> int:
    while time.monotonic() - start < PATIENCE:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _be_the_command(words: list[str], files: dict[str, Path]) -> None:
    """Never returns."""
    status = _DIED
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(files[name], os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        spent = resource.getrusage(resource.RUSAGE_SELF)
        cpu = int(spent.ru_utime + spent.ru_stime) + SECONDS + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + EXTRA_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sockets = os.open(files["sockets"], os.O_WRONLY | os.O_APPEND)

        def watch(event: str, args: object) -> None:
            if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
                os.write(sockets, f"{event}\n".encode())

        sys.addaudithook(watch)
        from conmoe_edge.cli.main import main

        try:
            main.main(words, prog_name="conmoe-edge")
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 0
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
