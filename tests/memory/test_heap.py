"""Freed blocks go back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.patience import PATIENCE

SCRIPT = """
import psutil, torch
from conmoe_edge.memory.heap import return_large_blocks
assert return_large_blocks()
process = psutil.Process()
before = process.memory_info().rss
kept = []
for step in range(64):  # grows like a cache, with something small and lasting in between
    block = torch.ones(3 * 2**18 + step * 2**12)
    kept.append(torch.ones(64))
    del block
assert process.memory_info().rss - before < 8 << 20, process.memory_info().rss - before
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_growing_blocks_leave_nothing_behind() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=PATIENCE)


TRIM = """
import psutil, torch
from conmoe_edge.memory.heap import trim_heap
process = psutil.Process()
blocks = [torch.ones(2**18) for _ in range(128)]  # 128 MiB in blocks of a MiB
kept = [torch.ones(64) for _ in range(64)]
full = process.memory_info().rss
del blocks
trim_heap()
assert full - process.memory_info().rss > 100 << 20
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_trimming_gives_freed_blocks_back() -> None:
    subprocess.run([sys.executable, "-c", TRIM], check=True, timeout=PATIENCE)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_steps_of_a_loop_leave_no_pieces_behind() -> None:
    subprocess.run([sys.executable, "-c", STEPS], check=True, timeout=PATIENCE)


STEPS = """
import psutil, torch
from conmoe_edge.memory.heap import GROWN, trimmed
process = psutil.Process()
del_first = torch.ones(31 << 18)  # from now on blocks of up to 31 MiB come from the heap
del del_first
before, kept = process.memory_info().rss, []
for step in trimmed(range(120)):
    block = torch.ones((8 << 18) + step * 2**13)  # more each time, with something that lasts behind it
    kept.append(torch.ones(2**16))
    del block
grown = process.memory_info().rss - before
assert grown < (30 << 20) + GROWN + (32 << 20), grown
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_threads_share_one_heap() -> None:
    """Without it each thread that allocates has a heap of its own, whose free bytes are of no use to the others."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_HEAP], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr


ONE_HEAP = """
import ctypes, threading
from conmoe_edge.memory.heap import one_heap
assert one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
found = []
def allocate():
    found.append(libc.malloc(50_000))
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
start, end = next(
    [int(one, 16) for one in line.split()[0].split("-")]
    for line in open("/proc/self/maps") if "[heap]" in line
)
assert all(start <= one < end for one in found), (hex(start), hex(end), found)
"""
