"""The operator's own threads: a program in C++ that uses them in every way, also under the thread sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conmoe_edge.offload.kernels.cpu.bindings import why_not
from conmoe_edge.offload.kernels.cpu.compiling import SOURCE
from tests.patience import PATIENCE

PROGRAM = Path(__file__).with_name("pool_of_threads.cpp")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


def built(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["g++", "-std=c++17", "-pthread", "-w", *options, f"-I{SOURCE.parent}"]
    command += [str(PROGRAM), "-o", str(folder / "pool")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [str(folder / "pool"), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr[-2000:]) == (0, "")


def test_every_part_is_done_once_by_whoever_is_free(tmp_path: Path) -> None:
    made = built(tmp_path, "-O2")
    assert made.returncode == 0, made.stderr[-2000:]
    run(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer of g++ on Linux")
def test_no_two_threads_write_where_another_reads(tmp_path: Path) -> None:
    made = built(tmp_path, "-O1", "-g1", "-fsanitize=thread")
    if made.returncode and "tsan" in made.stderr:
        pytest.skip("this compiler has no thread sanitizer")
    assert made.returncode == 0, made.stderr[-2000:]
    run(tmp_path, "300", "without forks")


PYTHON = """
import os
from concurrent.futures import ThreadPoolExecutor
import torch
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.offload.kernels.cpu.bindings import operator

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
made = operator()
matrix = made.prepare(quantise(torch.randn(1024, 1024), "int8"))
x = torch.randn(1, 2, 1024)
before, expected = threads(), made.few_rows([matrix], x)
assert threads() == before
torch.set_num_threads(3)

def right():
    return torch.equal(made.few_rows([matrix], x), expected)

assert right() and threads() == before + 2
torch.set_num_threads(2)
assert right() and threads() == before + 2
for _ in range(3):
    child = os.fork()
    if not child:
        alone = threads() == 1
        os._exit(0 if right() and right() and alone and threads() == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
with ThreadPoolExecutor(4) as askers:
    assert all(askers.map(lambda _: right(), range(200)))
print("right")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_threads_are_as_many_as_torch_says_also_after_a_fork_and_for_several() -> None:
    if why_not():
        pytest.skip(why_not())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PYTHON], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")
