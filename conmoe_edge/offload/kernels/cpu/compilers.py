"""C++ compilers of this machine, in the order in which they are tried.

``CXX`` is the only one where it names one. Else what the system has comes first (``g++``, ``clang++``, ``c++``), then
the one that pip brings: the package ``ziglang`` of the extra ``[compile]`` holds clang with its own C++ library and the
C libraries of other systems, so it also builds what runs elsewhere (``tools/platform_wheels.py``). All of them take
the same flags, but for names of processors (``zig_flag``). Microsoft's own compiler is not among them.

Memory: what a compiler prints.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from conmoe_edge.extras import install_command
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

SECONDS = 1500
"""For one call of a compiler: minutes on a busy machine. The first one of zig also builds a C++ library."""
_NAMES = ("g++", "clang++", "c++")


@dataclass(frozen=True, slots=True)
class Compiler:
    """A compiler driver that was found.

    Attributes:
        command: what is run, without flags.
        version: the first line that it says of itself.
        kind: whose flags it takes where they differ.
    """

    command: tuple[str, ...]
    version: str
    kind: Literal["gcc", "clang", "zig"]

    @property
    def name(self) -> str:
        """As messages call it."""
        return "ziglang" if self.kind == "zig" else Path(self.command[0]).name

    @property
    def identity(self) -> tuple[str, ...]:
        """What a library depends on of it. ``ziglang`` is the same wherever it is installed."""
        return (self.version,) if self.kind == "zig" else (*self.command, self.version)

    def flags(self, flags: Sequence[str]) -> list[str]:
        """``flags`` as this compiler writes them."""
        return [zig_flag(one) for one in flags] if self.kind == "zig" else list(flags)

    def run(self, arguments: Sequence[str]) -> str:
        """What it prints.

        Raises:
            Unavailable: it does not run, fails or takes too long.
        """
        return run([*self.command, *arguments], SECONDS, self.name)


def zig_flag(flag: str) -> str:
    """Zig has its names for processors: ``-march=x86-64-v3`` is ``-mcpu=x86_64_v3``, ``-march=armv8.2-a+dotprod`` is
    ``-mcpu=generic+v8_2a+dotprod``.
    """
    name, _, value = flag.partition("=")
    if name != "-march":
        return flag
    base, *features = value.split("+")
    if base.startswith("armv"):
        base, features = "generic", [base.removeprefix("arm").removesuffix("-a") + "a", *features]
        features[0] = features[0].replace(".", "_")
    return "-mcpu=" + "+".join([base.replace("-", "_"), *features])


def compilers() -> Iterator[Compiler]:
    """Those that there are; one that does not say its version is none.

    Raises:
        Unavailable: ``CXX`` names what is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in _NAMES]:
        path = shutil.which(command[0])
        if path is None or _asks_for_tools(path):
            continue
        with contextlib.suppress(Unavailable):
            command = (path, *command[1:])
            version = run([*command, "--version"], SECONDS, Path(path).name).partition("\n")[0]
            yield Compiler(command, version, "clang" if "clang" in version else "gcc")
            if named:
                return
    if named:
        raise Unavailable(f"CXX names no C++ compiler: {' '.join(named)} (unset CXX, or mend it)")
    found = zig()
    if found is not None:
        yield found


def zig() -> Compiler | None:
    """The compiler of the package ``ziglang``, where that is installed."""
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        return None
    program = Path(found.origin).with_name("zig.exe" if os.name == "nt" else "zig")
    if not program.is_file():
        return None
    return Compiler((str(program), "c++"), f"ziglang {metadata.version('ziglang')}", "zig")


def none_found() -> Unavailable:
    """That there is no compiler, and how one comes."""
    system = {"Darwin": "xcode-select --install", "Linux": "install g++"}.get(platform.system())
    ways = ", or: ".join(filter(None, (system, install_command("compile"))))
    return Unavailable(f"there is no C++ compiler ({ways})")


def _asks_for_tools(path: str) -> bool:
    """macOS has stand-ins under these names that open a window where the command line tools are not installed."""
    if platform.system() != "Darwin" or not path.startswith("/usr/bin/"):
        return False
    asked = subprocess.run(["/usr/bin/xcode-select", "-p"], capture_output=True, check=False)
    return asked.returncode != 0


def run(command: Sequence[str], seconds: float, name: str) -> str:
    """What a command prints. It is a driver with children, which end with it where it takes longer than ``seconds``.

    Raises:
        Unavailable: it does not run, fails or takes too long; ``name`` is what the message calls it.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"{name} does not run: {error}") from error
    try:
        output, errors = process.communicate(timeout=seconds)
    except BaseException as error:
        _end(process)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unavailable(f"{name} took longer than {seconds:g} s") from error
        raise
    if process.returncode != 0:
        first = next((line for line in errors.splitlines() if "error" in line), "")
        # What stands before the error is the path of a folder that is gone.
        said = first[max(0, first.find("error")) :]
        raise Unavailable(f"{name} failed: {said[:160]}")
    return output


def _end(process: subprocess.Popen[str]) -> None:
    """With its children; on Windows ``taskkill`` knows these."""
    if os.name == "nt":
        kill = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(kill, capture_output=True, check=False)
        return
    with contextlib.suppress(ProcessLookupError):  # it has ended in this moment
        os.killpg(process.pid, signal.SIGKILL)
