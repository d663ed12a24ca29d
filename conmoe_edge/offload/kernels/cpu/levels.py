"""Instruction sets that the operator is compiled for, a library each, and the best one that this machine has.

A level is there because ``csrc`` has code of its own for it: sums of bytes in one instruction (VNNI, the dot product of
ARM), vectors of 512 or 256 bits, or none of these. So a library can be built once and shipped; nothing is compiled for
one processor alone.

What there is says torch, which asks the processor and whether the system saves the registers between programs, on every
system (``torch.cpu.get_capabilities``, by cpuinfo). Linux says it itself for ARM, also where a processor is emulated.
Releases of torch before that function are helped out by ``/proc/cpuinfo``, which lists what Linux has switched on.

``CONMOE_OPERATOR_LEVEL`` names another level that this machine has.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from conmoe_edge.offload.kernels.cpu.targets import architecture
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

FORCED = "CONMOE_OPERATOR_LEVEL"
"""Environment variable: the level to use."""


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction set.

    Attributes:
        name: in names of libraries, and for people.
        flags: for g++ and clang++.
        needs: of the processor, as ``features`` has them. What ``flags`` allow beyond that comes with it.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()


_V3 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_PLAIN = "plain"
_LEVELS = {
    "x86_64": (
        Level("avx512-vnni", ("-march=x86-64-v4", "-mavx512vnni"), _V4 | {"avx512vnni"}),
        Level("avx512", ("-march=x86-64-v4",), _V4),
        Level("avx-vnni", ("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avxvnni"}),
        Level("avx2", ("-march=x86-64-v3",), _V3),
        Level(_PLAIN, ("-march=x86-64",)),
    ),
    "aarch64": (
        Level("dotprod", ("-march=armv8.2-a+dotprod",), frozenset({"dot"})),
        Level("neon", ("-march=armv8-a",)),
    ),
}
_HWCAP, _HWCAP_ASIMDDP = 16, 1 << 20
"""Of Linux for ARM: a key of ``getauxval``, and its bit for the dot product."""
_SAME = {"fma3": "fma", "bmi": "bmi1"}
"""Names of torch, and those of Linux."""


def levels_of(machine: str) -> tuple[Level, ...]:
    """Those of an architecture (as of ``platform.machine``), best first; the last one runs on all processors of it."""
    return _LEVELS.get(architecture(machine), (Level(_PLAIN, ()),))


def levels_here() -> tuple[Level, ...]:
    """Those that this machine has, best first."""
    found = features()
    return tuple(one for one in levels_of(platform.machine()) if one.needs <= found)


def best_level() -> Level:
    """The best one of this machine, or the one that ``CONMOE_OPERATOR_LEVEL`` names.

    Raises:
        Unavailable: that is none of this machine.
    """
    there = levels_here()
    wanted = os.environ.get(FORCED, "")
    if not wanted:
        return there[0]
    for one in there:
        if one.name == wanted:
            return one
    known = any(one.name == wanted for one in levels_of(platform.machine()))
    why = "this processor does not have it" if known else "there is no such level"
    names = ", ".join(one.name for one in there)
    raise Unavailable(f"{FORCED}={wanted}: {why} (one of: {names})")


@cache
def features() -> Set[str]:
    """What this processor has and the system lets programs use, by the names that Linux has without underscores."""
    if architecture(platform.machine()) == "aarch64" and platform.system() == "Linux":
        ask = ctypes.CDLL(None).getauxval
        ask.restype, ask.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)
        return frozenset({"dot"} if ask(_HWCAP) & _HWCAP_ASIMDDP else ())
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11
    if ask is not None:
        found = frozenset(_name(key) for key, there in ask().items() if there is True)
        if found:
            return found
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return _by_capability(torch.backends.cpu.get_cpu_capability())
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(_name(one) for one in flags.split())


def _name(feature: str) -> str:
    return _SAME.get(feature, feature.replace("_", ""))


def _by_capability(name: str) -> Set[str]:
    """What torch's own kernels need that are chosen here."""
    return {"AVX512": _V4, "AVX2": _V3}.get(name, frozenset())
