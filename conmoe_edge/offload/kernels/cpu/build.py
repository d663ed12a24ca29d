"""Compile the operator for an instruction set of this processor, once, with the compiler that the machine has.

``library()`` gives the path of a shared library in the user's cache folder. It is compiled on the first call ever
(about two seconds) and found there afterwards. Its name is a digest of everything that went into it: source, flags
(those of the best of ``levels.py``), layout of the structures, compiler, C library. Nothing is compiled out of a model
folder.

The ``ctypes`` structures (``structs.py``, ``attention_tables.py``, ``decoder_tables.py``) are the one description of
their layout: sizes and offsets go into the compiled text as static assertions, so a C++ structure that differs does not
compile.

A library from the cache is opened only if nobody but the user (or root) can have written it, and if it ends with the
SHA-256 digest of what comes before (``dlopen`` does not look behind the sections). One that was cut off or changed, or
that somebody else owns or may write, is compiled anew in its place.

A library that was just built is tried in a process of its own first (``self_test.py``): a miscompiled one may crash
there. What came of it is written beside the library, so that one that crashed is not opened at the next start either.

The library has threads of its own (``csrc/pool.h``), as many as ``torch.set_num_threads`` says, and needs no other
library than that of the compiler.

``CONMOE_OPERATOR_SANITIZE=1`` builds with the address and undefined-behaviour sanitizers, under a name of its own
(``make test-asan``).

Peak memory: the compiler's, in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

from conmoe_edge.offload.kernels.cpu.decoder_tables import STRUCTURES
from conmoe_edge.offload.kernels.cpu.levels import best_level
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

SOURCE = Path(__file__).with_name("csrc") / "operator.cpp"
SWITCH = "CONMOE_OPERATOR"
"""Environment variable; ``off`` keeps to torch's own kernels."""
SANITIZE = "CONMOE_OPERATOR_SANITIZE"
"""Environment variable; ``1`` builds with sanitizers."""

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fopenmp-simd",
    "-pthread",
    "-fPIC",
    "-w",
)
_LINK = (
    "-shared",
    "-pthread",
    "-Wl,-z,defs",
)  # what is undefined is an error now, not a crash at the first call
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1")
_SECONDS, _SANITIZED_SECONDS = 400, 900
_DIGEST_BYTES = 32
TOLD_SUFFIX = ".tried"
"""Of the file beside a library that says what its self test gave: the library's digest and, in a second line, what is
wrong with it.
"""
_WRONG = 3
_TRY = f"""
import ctypes, sys
from conmoe_edge.offload.kernels.cpu.build import Unavailable
from conmoe_edge.offload.kernels.cpu.operator import Operator
from conmoe_edge.offload.kernels.cpu.self_test import check
try:
    check(Operator(ctypes.CDLL(sys.argv[1])))
except (Unavailable, OSError, AttributeError) as error:
    print(error)
    raise SystemExit({_WRONG})
"""


def library() -> Path:
    """The compiled operator.

    Raises:
        Unavailable: switched off, a level that is none of this machine, no compiler, one that failed, a cache that
            belongs to another user, or an operator that crashes or computes wrongly.
    """
    path, compiler, flags = _place()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (path.parent.parent, path.parent):
            _close_to_others(folder)
        if not (_is_own(path) and _is_whole(path)):
            _compile(compiler, flags, path)
        _try_apart(path, _seconds())
    except OSError as error:
        raise Unavailable(f"{path.parent} cannot be used: {error.strerror}") from error
    return path


def is_built() -> bool:
    """Whether ``library`` finds one that was compiled and tried, so that it does not take long.

    Raises:
        Unavailable: there can be none here.
    """
    path = _place()[0]
    return path.is_file() and path.with_suffix(TOLD_SUFFIX).is_file()


def _place() -> tuple[Path, str, tuple[str, ...]]:
    """Where the library is or will be, the compiler, and flags of the level and of sanitizers."""
    if os.environ.get(SWITCH, "").lower() == "off":
        raise Unavailable(f"{SWITCH}=off")
    if os.name != "posix" or platform.system() == "Darwin":
        raise Unavailable(f"not built on {platform.system()}")
    compiler, version = _compiler()
    flags = (*best_level().flags, *(_SANITIZERS if _sanitized() else ()))
    parts = (*_FLAGS, *_LINK, *flags, compiler, version)
    path = user_cache_path("conmoe-edge") / "operator" / f"{_digest(parts)}.so"
    return path, compiler, flags


def _sanitized() -> bool:
    return os.environ.get(SANITIZE) == "1"


def _seconds() -> int:
    return _SANITIZED_SECONDS if _sanitized() else _SECONDS


def _compiler() -> tuple[str, str]:
    """A compiler, and what it says of its version."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        path = shutil.which(name) if name else None
        if path is not None:
            return path, _run([path, "--version"]).partition("\n")[0]
    raise Unavailable("there is no C++ compiler (install g++ to compute faster)")


def _digest(parts: tuple[str, ...]) -> str:
    machine = (*platform.libc_ver(), _assertions())
    digest = hashlib.sha256("\0".join((*parts, *machine)).encode())
    for one in sorted([SOURCE, *SOURCE.parent.glob("*.h")]):
        digest.update(one.read_bytes())
    return digest.hexdigest()[:32]


def processor() -> str:
    """Which processor this is, as text: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _assertions() -> str:
    """C++: the size of every structure, and the place and size of each of its fields."""
    lines = []
    for structure in STRUCTURES:
        name = structure.__name__.lstrip("_")
        lines.append(f"sizeof({name}) == {ctypes.sizeof(structure)}")
        for field, *_ in structure._fields_:
            at = getattr(structure, field)
            lines.append(f"offsetof({name}, {field}) == {at.offset}")
            lines.append(f"sizeof({name}::{field}) == {at.size}")
    return "".join(f'static_assert({one}, "as in the tables in Python");\n' for one in lines)


def _close_to_others(folder: Path) -> None:
    """A folder of the user's that others may write, as where new folders are made for a group, is closed to them, and
    what lies in it is built again.
    """
    _refuse_another_owner(folder)
    if folder.stat().st_mode & 0o022:
        folder.chmod(0o700)
        for found in folder.glob("*.so"):
            found.unlink()


def _refuse_another_owner(path: Path) -> None:
    if path.stat().st_uid not in (os.geteuid(), 0):
        raise Unavailable(
            f"{path} belongs to another user (set XDG_CACHE_HOME to a folder of yours)"
        )


def _is_own(path: Path) -> bool:
    """Whether there is a plain file that nobody but the user and root can have written."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False
    trusted = info.st_uid in (os.geteuid(), 0) and not info.st_mode & 0o022
    return trusted and stat.S_ISREG(info.st_mode)


def _is_whole(path: Path) -> bool:
    content = path.read_bytes()
    return (
        hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]
        and len(content) > _DIGEST_BYTES
    )


def _try_apart(path: Path, seconds: int) -> None:
    """The self test of the library in another process, once: what crashes there does not crash here.

    Raises:
        Unavailable: it has crashed, or computes wrongly; also where that was found earlier.
    """
    with path.open("rb") as file:
        file.seek(-_DIGEST_BYTES, os.SEEK_END)
        digest = file.read().hex()
    told = path.with_suffix(TOLD_SUFFIX)
    if _is_own(told):
        tried, _, reason = told.read_text("utf-8", "replace").partition("\n")
        if tried == digest:
            if reason:
                raise Unavailable(f"{reason} (remove {told} to try again)")
            return
    reason = _self_test(path, seconds)
    with contextlib.suppress(OSError):  # it is tried again at the next start then
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{digest}\n{reason}")
        Path(name).replace(told)
    if reason:
        raise Unavailable(reason)


def _self_test(path: Path, seconds: int) -> str:
    """What is wrong with the library; empty where nothing is.

    Raises:
        Unavailable: that cannot be found out now.
    """
    # The same modules as here, and none from the folder in which this runs.
    modules = os.pathsep.join(one for one in sys.path if one)
    command = [sys.executable, "-P", "-c", _TRY, str(path)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": modules},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the compiled operator could not be tried: {error}") from error
    if done.returncode < 0:
        return f"the compiled operator crashes (signal {-done.returncode})"
    if done.returncode == _WRONG:
        return done.stdout.strip()[:300] or "the compiled operator is wrong"
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise Unavailable(f"the compiled operator could not be tried: {last[:200]}")
    return ""


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        text, code = Path(folder) / "checked.cpp", Path(folder) / "operator.o"
        built = Path(folder) / "operator.so"
        text.write_text(_assertions(), "utf-8")
        options = [*_FLAGS, *flags, "-include", str(SOURCE)]
        _run([compiler, *options, "-c", str(text), "-o", str(code)], _seconds())
        _run([compiler, *_LINK, *flags, str(code), "-o", str(built)])
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.chmod(0o700)
        built.replace(path)  # whole or absent, also where two processes compile at a time


def _run(command: list[str], seconds: int = _SECONDS) -> str:
    """What it prints. The compiler is a driver with children, so it gets a process group, which ends with it."""
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
    try:
        output, errors = process.communicate(timeout=seconds)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):  # it has ended in this moment
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unavailable(f"{command[0]} took longer than {seconds} s") from error
        raise
    if process.returncode != 0:
        first = next((line for line in errors.splitlines() if "error" in line), "")
        raise Unavailable(f"{Path(command[0]).name} failed: {first[:160]}")
    return output
