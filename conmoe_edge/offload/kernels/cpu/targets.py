"""Systems and processors that a library of the operator is made for, and what a compiler is told for each.

Pure data; this machine is ``here()``.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

System = Literal["linux", "windows", "macos"]
_SYSTEMS: dict[str, System] = {"Linux": "linux", "Windows": "windows", "Darwin": "macos"}
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
COMMON = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp-simd", "-w")
"""Flags of every system. Vectors inside a loop are OpenMP's, threads are our own."""


@dataclass(frozen=True, slots=True)
class Target:
    """A system with a processor.

    Attributes:
        system, machine: as here; ``machine`` is ``x86_64``, ``aarch64`` or what else the system calls its own.
        libc: what ``zig`` puts behind ``-linux-``: the oldest C library that the result runs on.
        tag: of a wheel that holds libraries for it; empty where none is made.
    """

    system: System
    machine: str
    libc: str = ""
    tag: str = ""

    @property
    def name(self) -> str:
        """``linux-x86_64`` and so on."""
        return f"{self.system}-{self.machine}"

    @property
    def suffix(self) -> str:
        """Of a shared library."""
        return {"linux": ".so", "windows": ".dll", "macos": ".dylib"}[self.system]

    @property
    def triple(self) -> str:
        """What ``zig`` calls it."""
        rest = {"linux": f"linux-{self.libc}", "windows": "windows-gnu", "macos": "macos.11.0"}
        return f"{self.machine}-{rest[self.system]}"

    @property
    def compile_flags(self) -> tuple[str, ...]:
        """Beside those of a level; Windows has no other code than what can be moved."""
        own = ("-pthread",) if self.system == "windows" else ("-fPIC", "-pthread")
        return (*COMMON, *own)

    @property
    def link_flags(self) -> tuple[str, ...]:
        """What is undefined is an error when it is linked, not a crash at the first call. On Windows nothing of the
        compiler's own libraries lies where the loader looks, so they go into the library.
        """
        own: dict[System, tuple[str, ...]] = {
            "linux": ("-Wl,-z,defs", "-pthread"),
            "windows": ("-static", "-pthread"),
            "macos": (),
        }
        return ("-shared", *own[self.system])


GLIBC = "gnu.2.28"
"""What torch's own wheels ask for."""
WHEELS = {
    one.name: one
    for one in (
        Target("linux", "x86_64", GLIBC, "manylinux_2_28_x86_64"),
        Target("linux", "aarch64", GLIBC, "manylinux_2_28_aarch64"),
        Target("windows", "x86_64", tag="win_amd64"),
        Target("macos", "aarch64", tag="macosx_11_0_arm64"),
        Target("macos", "x86_64", tag="macosx_11_0_x86_64"),
    )
}
"""Systems that wheels with libraries are made for, by name."""


def architecture(machine: str) -> str:
    """Of a processor, by what the system calls it (``platform.machine``): ``x86_64``, ``aarch64``, or its own word."""
    name = machine.lower()
    return _ARCHITECTURES.get(name, name)


def here() -> Target:
    """This machine.

    Raises:
        Unavailable: a system that the operator is not built on.
    """
    system = _SYSTEMS.get(platform.system())
    if system is None:
        raise Unavailable(f"not built on {platform.system()}")
    glibc = platform.libc_ver()[0] == "glibc"
    libc = "" if system != "linux" else GLIBC if glibc else "musl"
    return Target(system, architecture(platform.machine()), libc)
