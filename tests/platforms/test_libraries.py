"""The libraries that wheels bring, as they are: on emulated processors and systems they compute what is written down.

``make test-platforms`` runs this, and installs what it needs. What is not there is skipped by name.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulators import emulator
from platforms.product_cases import write_cases

from conmoe_edge.offload.kernels.cpu.compilers import Compiler
from conmoe_edge.offload.kernels.cpu.levels import levels_here
from conmoe_edge.offload.kernels.cpu.targets import COMMON, WHEELS, Target
from tools.platform_wheels import STAGED, staged_libraries

pytestmark = pytest.mark.platforms
CHECK = Path(__file__).with_name("check_library.cpp")
THIS = "this machine"


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor or a system that runs programs of another one."""

    name: str
    system: str
    levels: tuple[str, ...]
    command: tuple[str, ...] = ()


def _machines() -> list[Machine]:
    arm = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu")
    intel = ("qemu-x86_64", "-cpu")
    there = tuple(one.name for one in levels_here())
    found = [
        Machine("x86-64 without AVX2", "linux-x86_64", ("plain",), (*intel, "qemu64")),
        Machine("x86-64 with AVX2", "linux-x86_64", ("avx2", "plain"), (*intel, "Haswell")),
        Machine("Arm without dot product", "linux-aarch64", ("neon",), (*arm, "cortex-a53")),
        Machine(
            "Arm with dot product", "linux-aarch64", ("dotprod", "neon"), (*arm, "neoverse-n1")
        ),
        Machine("Arm with all of qemu", "linux-aarch64", ("dotprod", "neon"), (*arm, "max")),
    ]
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        found.append(Machine(THIS, "linux-x86_64", there))
        found.append(Machine("Windows by wine", "windows-x86_64", there, ("wine64",)))
    return found


RUNS = [(machine, level) for machine in _machines() for level in machine.levels]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cases") / "cases"
    assert write_cases(path) > 50
    return path


def program_for(compiler: Compiler, target: Target) -> Path:
    """``check_library.cpp`` for a target, beside its libraries, so that it is compiled once."""
    path = STAGED / target.name / ("check.exe" if target.system == "windows" else "check")
    if not path.is_file() or path.stat().st_mtime < CHECK.stat().st_mtime:
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = ["-fno-exceptions", "-fno-rtti", "-nostdlib++"]
        options = ["-target", target.triple, *COMMON, "-s", *plain, str(CHECK), "-o", str(path)]
        compiler.run([*options, *(["-ldl"] if target.system == "linux" else [])])
    return path


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("machine", "level"), RUNS, ids=lambda one: getattr(one, "name", one))
def test_a_library_computes_what_is_written_down(
    compiler: Compiler, cases: Path, machine: Machine, level: str, tmp_path: Path
) -> None:
    command = list(machine.command)
    if command:
        found = emulator(command[0])
        if found is None or (
            "-L" in command and not Path(command[command.index("-L") + 1]).is_dir()
        ):
            pytest.skip(f"{' '.join(command[:3])} is not here")
        command[0] = found
    target = WHEELS[machine.system]
    library = staged_libraries(compiler, target, [level])[level]
    program = program_for(compiler, target)
    done = subprocess.run(
        [*command, str(program), str(library), str(cases), level],
        env={**os.environ, "WINEPREFIX": str(STAGED / "wine"), "WINEDEBUG": "-all"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    print(f"\n{machine.name}, {level}: {done.stdout.strip().rpartition(chr(10))[2]}")
