"""Freed blocks go back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)


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
    subprocess.run([sys.executable, "-c", TRIM], check=True, timeout=120)
