"""Wheels that bring the CPU operator compiled, for the systems of ``targets.WHEELS``.

    pip install -e ".[compile]"
    python tools/platform_wheels.py                          # all of them, into dist/
    python tools/platform_wheels.py linux-x86_64 --out wheels

Every library is compiled by ``ziglang``, which has the C and C++ libraries of all these systems, so any of them builds
the wheels of all. A level takes a minute of processor; the first one for a system another, in which its C++ library is
built. Then ``pip wheel`` packs them (``hatch_build.py``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from conmoe_edge.extras import install_command
from conmoe_edge.offload.kernels.cpu.build import shipped_key
from conmoe_edge.offload.kernels.cpu.compilers import Compiler, zig
from conmoe_edge.offload.kernels.cpu.compiling import compile_library
from conmoe_edge.offload.kernels.cpu.levels import levels_of
from conmoe_edge.offload.kernels.cpu.library_files import put_library, whole_library
from conmoe_edge.offload.kernels.cpu.targets import WHEELS, Target

ROOT = Path(__file__).resolve().parents[1]
STAGED = ROOT / "build" / "operator"
_HEX = "[0-9a-f]" * 32


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build wheels that bring the CPU operator.")
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=", ".join(WHEELS))
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheels")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.systems) - set(WHEELS))
    if unknown:
        parser.error(f"no wheels are made for {', '.join(unknown)}; there are {', '.join(WHEELS)}")
    compiler = zig()
    if compiler is None:
        raise SystemExit(f"ziglang is not installed: {install_command('compile')}")
    for name in asked.systems or WHEELS:
        for library in staged_libraries(compiler, WHEELS[name]).values():
            print(f"{name}: {library.name}, {library.stat().st_size / 1e6:.2f} MB", flush=True)
        print(f"{name}: {packed(name, asked.out)}", flush=True)


def staged_libraries(
    compiler: Compiler, target: Target, wanted: Sequence[str] = ()
) -> dict[str, Path]:
    """The libraries of a system by level, compiled where they are not there yet: all of them, or those that are
    ``wanted``. Older ones are taken away.
    """
    folder = STAGED / target.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "TAG").write_text(target.tag, encoding="utf-8")
    made = {}
    for level in levels_of(target.machine):
        if wanted and level.name not in wanted:
            continue
        key = shipped_key(target, level.name, level.flags)
        path = whole_library(folder, key, target.suffix, ours=False)
        if path is None:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                built = Path(place) / f"operator{target.suffix}"
                compile_library(compiler, target, level.flags, built)
                path = put_library(built, folder, key, target.suffix)
        made[level.name] = path
        for other in set(folder.glob(f"{key.rpartition('-')[0]}-{_HEX}-{_HEX}.*")) - {path}:
            other.unlink()
    return made


def packed(name: str, out: Path) -> Path:
    """The wheel of the libraries that were compiled for the system ``name``."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as place:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--wheel-dir", place, str(ROOT)]
        subprocess.run(command, check=True, env={**os.environ, "CONMOE_WHEEL": name})
        (wheel,) = Path(place).glob("*.whl")
        return Path(shutil.move(wheel, out / wheel.name))


if __name__ == "__main__":
    main()
