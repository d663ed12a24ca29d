"""What this machine can do, and what a child process took: the rates behind the bounds.

    python -m benchmarks.measure gemm      prints the matrix rates as JSON

The parent of a measured child has to stay small: Linux starts a child's peak memory at what its
parent had, so torch is only imported in the ``gemm`` command, which is itself run as a child.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

BLOCK = 16 << 20
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Child:
    """A finished child process.

    Attributes:
        peak_rss: most resident bytes, pages of mapped files included (``ru_maxrss``).
        peak_anonymous: most resident bytes that are no file's pages, sampled every 20 ms.
        cgroup_peak: most bytes charged to the child's own memory cgroup, page cache and all;
            ``None`` where no cgroup could be made.
        limit: the hard limit of that cgroup, if one was set.
    """

    command: list[str]
    returncode: int
    seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_anonymous: int
    cgroup_peak: int | None
    limit: int | None
    stdout: str


def run_child(command: Sequence[str], limit: int | None = None) -> Child:
    """Run a command to its end; its stderr goes to ours. ``limit`` bytes are enforced by a cgroup.

    Raises:
        RuntimeError: a limit was asked for and no memory cgroup can be made here.
    """
    with tempfile.TemporaryFile() as out, memory_cgroup(limit) as cgroup:
        if limit is not None and cgroup is None:
            raise RuntimeError("a memory limit needs a memory cgroup that this user may write")
        inside = list(command)
        if cgroup is not None:  # the shell moves itself, so that nothing is charged elsewhere
            join = f'echo $$ > "{cgroup / "cgroup.procs"}" && exec "$@"'
            inside = ["/bin/sh", "-c", join, "sh", *command]
        start = time.perf_counter()
        process = subprocess.Popen(inside, stdout=out)
        anonymous = [0]
        done = threading.Event()
        sampler = threading.Thread(target=_sample, args=(process.pid, anonymous, done), daemon=True)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # whoever ends this process ends the measured one too
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        sampler.join()
        out.seek(0)
        return Child(
            command=list(command),
            returncode=process.returncode,
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_rss=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            peak_anonymous=anonymous[0],
            cgroup_peak=cgroup_peak(cgroup),
            limit=limit,
            stdout=out.read().decode(errors="replace"),
        )


def _sample(pid: int, peak: list[int], done: threading.Event) -> None:
    """Keep the largest ``RssAnon`` of a process in ``peak[0]``; does nothing without /proc."""
    status = Path(f"/proc/{pid}/status")
    while not done.wait(SAMPLE_SECONDS):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)


@contextlib.contextmanager
def memory_cgroup(limit: int | None) -> Iterator[Path | None]:
    """A fresh memory cgroup below our own, or ``None`` where we may not make one."""
    parent = own_memory_cgroup()
    group = None
    if parent is not None:
        with contextlib.suppress(OSError):
            group = parent / f"conmoe-benchmark-{os.getpid()}"
            group.mkdir()
            if cgroup_peak(group) is None:
                group.rmdir()
                group = None
    if group is not None and limit is not None:
        names = ("memory.limit_in_bytes", "memory.max")
        (group / next(n for n in names if (group / n).exists())).write_text(str(limit))
    try:
        yield group
    finally:
        if group is not None:
            with contextlib.suppress(OSError):
                group.rmdir()


def own_memory_cgroup() -> Path | None:
    """Where the memory controller keeps this process: version 1 first, then the unified tree."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        for line in sorted(lines, key=lambda line: "memory" not in line):
            _, controllers, path = line.split(":", 2)
            root = Path("/sys/fs/cgroup") / ("memory" if "memory" in controllers else "")
            if controllers and "memory" not in controllers:
                continue
            found = root / path.lstrip("/")
            if found.is_dir():
                return found
    return None


def cgroup_peak(group: Path | None) -> int | None:
    """The high-water mark of a memory cgroup."""
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        with contextlib.suppress(OSError, ValueError):
            if group is not None:
                return int((group / name).read_text())
    return None


def forget(paths: Sequence[Path]) -> bool:
    """Ask the kernel to drop these files from its cache; false where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def disk_read_rate(path: Path, limit: int = 2 << 30) -> tuple[float, str]:
    """Bytes per second of a sequential read past the cache, and how it got past."""
    buffer = mmap.mmap(-1, BLOCK)  # page-aligned, as direct reads want it
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        how = "O_DIRECT"
    except (OSError, AttributeError):
        forget([path])
        fd = os.open(path, os.O_RDONLY)
        how = "cache dropped"
    try:
        done = 0
        start = time.perf_counter()
        while done < limit:
            got = os.readv(fd, [buffer])
            done += got
            if got < BLOCK:
                break
        return done / (time.perf_counter() - start), how
    finally:
        os.close(fd)
        buffer.close()


def disk_write_rate(folder: Path, count: int = 1 << 30) -> float:
    """Bytes per second of a sequential write, fsync included. The file is removed again."""
    block = os.urandom(BLOCK)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(count // BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return count / (time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class Gemm:
    """A matrix product [m, k] x [k, n] and its best rate, in FLOP/s."""

    name: str
    dtype: str
    m: int
    k: int
    n: int
    flops_per_second: float


def gemm_rates(
    rows: int, hidden: int, width: int, vocab: int, pool: int, seconds: float
) -> list[Gemm]:
    """The products that a fit is made of, each tried for ``seconds`` in fp32 and bf16.

    Args:
        rows: tokens that one expert sees.
        pool: experts of a scope; their distances are a Gram matrix.
    """
    import torch

    def best(m: int, k: int, n: int, dtype: torch.dtype) -> float:
        a = torch.randn(m, k).to(dtype)
        b = torch.randn(n, k).to(dtype)  # as a Linear holds its weight
        torch.nn.functional.linear(a, b)
        record = 0.0
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            record = max(record, 2 * m * k * n / (time.perf_counter() - start))
        return record

    shapes = {
        "attention": (rows, hidden, hidden),
        "experts up": (rows, hidden, 2 * width),
        "experts down": (rows, width, hidden),
        "head": (512, hidden, vocab),
        "distance": (pool, 1 << 18, pool),
    }
    return [
        Gemm(name, str(dtype).removeprefix("torch."), m, k, n, best(m, k, n, dtype))
        for dtype in (torch.float32, torch.bfloat16)
        for name, (m, k, n) in shapes.items()
    ]


def cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    memory = None
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
        first = Path("/proc/meminfo").read_text().splitlines()[0]
        memory = int(first.split()[1]) * 1024
    return {
        "cpu": model,
        "cores": cores(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def main() -> None:
    """``gemm`` with its sizes as key=value."""
    if len(sys.argv) < 2 or sys.argv[1] != "gemm":
        sys.exit("usage: python -m benchmarks.measure gemm [rows=4096 hidden=2048 ...]")
    import torch

    sizes = {"rows": 4096, "hidden": 2048, "width": 1024, "vocab": 50304, "pool": 64}
    sizes |= {key: int(value) for key, value in (word.split("=") for word in sys.argv[2:])}
    rates = gemm_rates(**sizes, seconds=1.5)
    found = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rates": [asdict(rate) for rate in rates],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
