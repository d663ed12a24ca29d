"""How fast this machine reads its memory and a disk: two short measurements, kept for a day.

The memory figure is a streaming read over 256 MiB with one thread a core (the C library looks for a
byte that is not there): what a kernel that does nothing but read can reach, the ceiling that decode
speed is held against. The disk figure is reads of whole blocks at places spread over a file,
past the page cache where the system allows it, with as many readers as the runtime has. Both take
the best of what they see in a part of a second: another process can only make them slower.

Peak memory: 256 MiB for the one, a block a reader for the other, given back at once. On the disk
64 MiB for a moment, where the folder has no file to read from, nameless where the system allows
that. What cannot be measured is ``None``.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from platformdirs import user_cache_path

from conmoe_edge.system_calls import (
    FOREIGN_FILE,
    allowed_processors,
    drop_from_cache,
    opened_directly,
    read_at,
)

CACHE_DIR_VARIABLE = "CONMOE_CACHE_DIR"
READERS = 3

_MEMORY_BYTES = 256 << 20
_MEMORY_SECONDS = 0.3
_DISK_SECONDS = 0.35
_WRITE_SECONDS = 0.5
_BLOCK = 4 << 20
_PAGE = 4096
_SCRATCH_BYTES = 64 << 20
_KEPT_SECONDS = 24 * 3600.0
_CACHE_NAME = "bandwidth.json"


class Meter:
    """The two figures of this machine, measured when they are first asked for.

    What was measured within the last day is taken from the user's cache folder, unless ``fresh``.
    The disk is the one that holds, or would hold, ``folder``; its figure is kept by device, so a
    second folder of the same disk costs nothing.
    """

    def __init__(self, folder: Path, *, fresh: bool = False, block: int = _BLOCK) -> None:
        self._folder = nearest_folder(folder)
        self._fresh = fresh
        self._block = block
        self._known: dict[str, float | None] = {}

    def memory(self) -> float | None:
        """Bytes a second of the RAM."""
        return self.figure(f"memory-{threads()}", memory_bandwidth)

    def disk(self) -> float | None:
        """Bytes a second of the disk, in reads of ``block`` bytes."""
        try:
            device = self._folder.stat().st_dev
        except OSError:
            return None
        name = f"disk-{device}-{self._block}"
        return self.figure(name, lambda: disk_bandwidth(self._folder, self._block))

    def figure(self, name: str, measure: Callable[[], float | None]) -> float | None:
        """Another one, known under ``name`` and kept like these."""
        if name not in self._known:
            found = None if self._fresh else _recall(name)
            if found is None:
                found = measure()
                found = None if found is None else float(round(found))  # as it will be recalled
                _remember(name, found)
            self._known[name] = found
        return self._known[name]


def threads() -> int:
    """Cores that this process may use, as the compute kernels count them."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return max(1, min(physical, allowed_processors() or physical))


def memory_bandwidth(nbytes: int = _MEMORY_BYTES, seconds: float = _MEMORY_SECONDS) -> float | None:
    """Bytes a second of a streaming read over ``nbytes``; ``None`` where they cannot be had."""
    search = _search()
    if search is None:
        return None
    count = threads()
    length = max(_PAGE, nbytes // count)
    with ExitStack() as stack:
        try:
            parts = [stack.enter_context(mmap.mmap(-1, length)) for _ in range(count)]
        except (OSError, ValueError, MemoryError):
            return None
        places = [_address(part) for part in parts]
        pool = stack.enter_context(ThreadPoolExecutor(count))
        # Pages that were never written are all the same one. Each thread writes its own, so that
        # they lie near the core that reads them.
        list(pool.map(lambda place: ctypes.memset(place, 1, length), places))
        best, end = 0.0, time.perf_counter() + seconds
        while True:
            start = time.perf_counter()
            list(pool.map(lambda place: search(place, 2, length), places))
            now = time.perf_counter()
            best = max(best, count * length / (now - start))
            if now >= end:
                return best


def _search() -> Callable[[int, int, int], Any] | None:
    """The C library's ``memchr``, which reads as fast as the machine can; ``None`` without one."""
    try:
        library = ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)
        search = library.memchr
    except (OSError, AttributeError):
        return None
    search.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    search.restype = ctypes.c_void_p
    return search


def _address(memory: mmap.mmap) -> int:
    """Where the memory begins. The mapping stays closable: nothing keeps a view of it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def disk_bandwidth(
    folder: Path, block: int = _BLOCK, seconds: float = _DISK_SECONDS
) -> float | None:
    """Bytes a second of reads of ``block`` bytes from a file in ``folder``, its largest or one that
    is written for it; ``None`` where neither can be read.
    """
    block = max(_PAGE, block - block % _PAGE)
    with suppress(OSError), _something_to_read(nearest_folder(folder), block) as handle:
        size = os.fstat(handle).st_size
        with _past_the_cache(handle) as direct:
            try:
                return _read_speed(direct, size, block, seconds)
            except OSError:  # a file system that opens like this and does not read
                return _read_speed(handle, size, block, seconds)
    return None


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest parent that exists."""
    place = folder.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place


def cache_folder() -> Path:
    """Where measurements are kept; the folder need not exist."""
    redirected = os.environ.get(CACHE_DIR_VARIABLE)
    return Path(redirected) if redirected else user_cache_path("conmoe-edge", appauthor=False)


def _read_speed(handle: int, size: int, block: int, seconds: float) -> float | None:
    """Blocks at places drawn with a fixed seed, by several readers, for a while."""
    places = list(range(0, size - block + 1, block))
    if not places:
        return None
    random.Random(0).shuffle(places)
    lock = threading.Lock()
    taken = [0]
    start = time.perf_counter()

    def read() -> int:
        done = 0
        with mmap.mmap(-1, block) as buffer, memoryview(buffer) as view:
            while True:
                with lock:
                    turn = taken[0]
                    taken[0] += 1
                # Once over the file is enough: what comes twice may come from a cache below us.
                if turn >= len(places) or (turn and time.perf_counter() - start > seconds):
                    return done
                done += read_at(handle, view, places[turn], lock)

    with ThreadPoolExecutor(READERS) as pool:
        total = sum(one.result() for one in [pool.submit(read) for _ in range(READERS)])
    spent = time.perf_counter() - start
    return total / spent if total and spent > 0 else None


@contextmanager
def _something_to_read(folder: Path, block: int) -> Iterator[int]:
    """A readable file on the disk of ``folder`` that the page cache need not hold."""
    largest = _largest_file(folder)
    if largest is not None and largest.stat().st_size >= max(_SCRATCH_BYTES // 4, 4 * block):
        handle = os.open(largest, os.O_RDONLY | FOREIGN_FILE)
        try:
            yield handle
        finally:
            os.close(handle)
        return
    with tempfile.TemporaryFile(dir=folder, prefix=".conmoe-probe-") as file:
        piece = os.urandom(4 << 20)
        end = time.perf_counter() + _WRITE_SECONDS
        for _ in range(_SCRATCH_BYTES // len(piece)):
            file.write(piece)
            if time.perf_counter() > end:
                break
        file.flush()
        os.fsync(file.fileno())
        yield file.fileno()


def _largest_file(folder: Path) -> Path | None:
    """Links are left alone: the folder may be foreign, and they may lead to another disk anyway."""
    found: list[tuple[int, str]] = []
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.is_file(follow_symlinks=False) and not entry.name.startswith("."):
                found.append((entry.stat(follow_symlinks=False).st_size, entry.path))
    return Path(max(found)[1]) if found else None


@contextmanager
def _past_the_cache(handle: int) -> Iterator[int]:
    """The same file for reads that leave the page cache alone; elsewhere what it holds of the file
    is dropped and the handle is the same.
    """
    direct = opened_directly(handle)
    if direct is None:
        with suppress(OSError):
            drop_from_cache(handle)
        yield handle
        return
    try:
        yield direct
    finally:
        os.close(direct)


def _recall(name: str) -> float | None:
    """A figure of the last day."""
    entry = _cache().get(name)
    if not isinstance(entry, dict):
        return None
    value, when = entry.get("bytes_per_second"), entry.get("measured")
    if not isinstance(value, int | float) or not isinstance(when, int | float):
        return None
    fresh = 0 <= time.time() - when < _KEPT_SECONDS
    return float(value) if fresh and value > 0 else None


def _remember(name: str, value: float | None) -> None:
    """Keep a figure; a cache that cannot be written costs the measurement next time."""
    if value is None:
        return
    known = _cache()
    known[name] = {"bytes_per_second": round(value), "measured": int(time.time())}
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{_CACHE_NAME}.{os.getpid()}"
        temporary.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
        temporary.replace(folder / _CACHE_NAME)


def _cache() -> dict[str, Any]:
    try:
        path = cache_folder() / _CACHE_NAME
        if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > 1 << 20:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
