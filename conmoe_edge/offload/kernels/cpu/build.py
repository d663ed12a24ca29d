"""Compile the operator for this processor, once, with the compiler that the machine has.

``library()`` gives the path of a shared library in the user's cache folder, compiled on the first call ever (about two
seconds) and found there afterwards. Its name is a digest of everything that went into it: the source, the flags, the
compiler's version, the processor's instruction sets and torch's version. Nothing is compiled out of a model folder.

The library uses the OpenMP runtime that torch brought along, so there is one pool of threads in the process and
``torch.set_num_threads`` holds for it; a second pool would fight with the first for the cores.

Peak memory: the compiler's, in a process of its own. Raises ``Unavailable`` with a reason that a user can read; the
caller then computes with torch's own kernels.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from platformdirs import user_cache_path

SOURCE = Path(__file__).with_name("csrc") / "operator.cpp"
SWITCH = "CONMOE_OPERATOR"
"""Environment variable; ``off`` keeps to torch's own kernels."""

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-w")
_SECONDS = 120


class Unavailable(Exception):
    """There is no operator here; the text says why."""


def library() -> Path:
    """The compiled operator.

    Raises:
        Unavailable: switched off, no compiler, a system without torch's OpenMP, or the compiler refused.
    """
    if os.environ.get(SWITCH, "").lower() == "off":
        raise Unavailable(f"{SWITCH}=off")
    if os.name != "posix" or platform.system() == "Darwin":
        raise Unavailable(f"not built on {platform.system()}")
    openmp = _openmp()
    compiler = _compiler()
    path = user_cache_path("conmoe-edge") / "operator" / f"{_digest(compiler, openmp)}.so"
    if not path.is_file():
        _compile(compiler, openmp, path)
    return path


def _openmp() -> Path:
    """The OpenMP runtime inside torch's own folder."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if not found:
        raise Unavailable("this build of torch brings no OpenMP library of its own")
    return found[0]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    raise Unavailable("there is no C++ compiler (install g++ to compute faster)")


def _digest(compiler: str, openmp: Path) -> str:
    version = _run([compiler, "--version"]).splitlines()[:1]
    parts = [*_FLAGS, compiler, *version, _processor(), str(openmp), torch.__version__]
    digest = hashlib.sha256("\0".join(parts).encode())
    for one in sorted([SOURCE, *SOURCE.parent.glob("*.h")]):
        digest.update(one.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What ``-march=native`` looks at: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, openmp: Path, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            code, built = Path(folder) / "operator.o", Path(folder) / "operator.so"
            _run([compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(code)])
            # Without -fopenmp here: that would link the system's runtime beside torch's.
            _run([compiler, "-shared", str(code), str(openmp), "-o", str(built)])
            built.replace(path)  # whole or absent, whoever else compiles it at this moment
    except OSError as error:
        raise Unavailable(f"{path.parent} cannot be written: {error.strerror}") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise Unavailable(f"{Path(command[0]).name} failed: {first[:160]}")
    return done.stdout
