"""Programs beside the operator's source, in every instruction set; those of ARM where they can be emulated.

``low_bit_sums.cpp``: sums of few bits in whole numbers. ``cached_rows.cpp``: scores and weighted sums of a cache's
rows. Each compares bit for bit with a plain loop.
"""

from __future__ import annotations

import platform
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from emulators import emulator

from conmoe_edge.offload.kernels.cpu.compiling import SOURCE

CHECKS = ("low_bit_sums.cpp", "cached_rows.cpp")
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")
SETS = {
    "this processor": ("g++", "native", ""),
    "AVX2": ("g++", "x86-64-v3", ""),
    "plain": ("g++", "x86-64", ""),
    "NEON": (ARM[0], "armv8-a", ARM[1]),
    "NEON with products of four bytes": (ARM[0], "armv8.2-a+dotprod", ARM[1]),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", SETS)
def test_it_finds_nothing_wrong(name: str, check: str, tmp_path: Path) -> None:
    compiler, march, other = SETS[name]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    runs = emulator(other) if other else ""
    if runs is None:
        pytest.skip(f"no {other} here")
    if march.startswith("x86") and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"this is no {march}")
    options = [
        "-std=c++17",
        "-O1",
        f"-march={march}",
        "-ffp-contract=fast",
        "-pthread",
        "-w",
        "-static",
    ]
    path = tmp_path / "check"
    command = [
        compiler,
        *options,
        f"-I{SOURCE.parent}",
        str(Path(__file__).with_name(check)),
        "-o",
        str(path),
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    done = subprocess.run(
        [*filter(None, [runs]), str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode == -signal.SIGILL:
        pytest.skip(f"this processor is no {march}")
    assert (done.returncode, done.stdout) == (0, "")
