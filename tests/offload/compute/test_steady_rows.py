"""Products are made with a few numbers of rows, and what is added changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from conmoe_edge.compat import native_bf16
from conmoe_edge.offload.compute.steady_rows import STEPS, padded, steady

MIB = 1 << 20


def test_the_next_step() -> None:
    for rows in range(1, 2000):
        assert rows <= steady(rows) < 2 * max(rows, 1) or rows == steady(rows)
    assert len({steady(rows) for rows in range(1, 513)}) == len(STEPS)


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 33, 500, 513])
def test_zeros_below_and_nothing_else(rows: int) -> None:
    x = torch.randn(rows, 8).bfloat16()
    wide = padded(x)
    assert wide.shape == (steady(rows), 8)
    assert torch.equal(wide[:rows], x) and not wide[rows:].any()
    assert padded(x.float()) is not None and padded(x.float()).shape == (rows, 8)


_GROWTH = """
import re, torch
from conmoe_edge.memory.heap import return_large_blocks
from conmoe_edge.offload.compute.steady_rows import padded
return_large_blocks()
def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
x, w = torch.randn(600, 192).bfloat16(), torch.randn(192, 192).bfloat16()
for rows in (1, 2, 600):
    torch.nn.functional.linear(x[:rows], w)
before = resident()
for rows in range(1, 513):
    torch.nn.functional.linear(%s, w)
print(resident() - before)
"""


@pytest.mark.skipif(
    not native_bf16() or not sys.platform.startswith("linux"), reason="no bf16 instructions here"
)
def test_every_number_of_rows_takes_the_memory_of_a_few() -> None:
    def growth(argument: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", _GROWTH % argument], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert growth("padded(x[:rows])") < 24 * MIB
    assert growth("x[:rows]") > 100 * MIB  # what this is for: once it is gone, so may the steps
