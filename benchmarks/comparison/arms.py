"""Who is compared with whom: systems, memory caps, groups. Data and names only.

A *system* is something that a user could pick: an engine and what it stores. A *cell* is a system
under a cap; cells that the project's claims rest on are ``needed`` and repeated more often. A
*group* holds the systems that are compared with each other and whose files have to be there at the
same time; groups run one after the other, so that a disk need not hold everything at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Engine = Literal["ours", "transformers", "offload", "llama"]
GIB = 1 << 30

MODULES = {
    "ours": "benchmarks.comparison.our_arm",
    "llama": "benchmarks.comparison.llama_arm",
    "transformers": "benchmarks.comparison.transformers_arm",
    "offload": "benchmarks.comparison.transformers_arm",
}
"""What runs an engine's arm."""


@dataclass(frozen=True, slots=True)
class ArmSettings:
    """What every arm is told, and the same for all."""

    prompt_tokens: int
    steps: int
    seconds: float
    threads: int
    context: int


@dataclass(frozen=True, slots=True)
class System:
    """An engine and what it stores.

    Attributes:
        key: its name in files and flags.
        label: its name in tables.
        form: number format of the experts, in the engine's own words.
        rate: reduction rate, for ours.
        dense: number format of the rest, for ours (``source``: the checkpoint's).
        repack: whether llama.cpp may copy weights into the layout of its kernels.
    """

    key: str
    label: str
    engine: Engine
    form: str
    rate: float = 0.0
    dense: str = "source"
    repack: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """A system under a cap in bytes, ``None`` for all the memory there is."""

    system: str
    cap: int | None
    group: str
    needed: bool = False

    @property
    def key(self) -> str:
        return f"{self.system}@{cap_name(self.cap)}"


@dataclass(frozen=True, slots=True)
class Claim:
    """Our cell over one of a peer's cells is at least ``ratio``; of several peers the fastest counts."""

    cap: int | None
    ours: str
    peers: tuple[str, ...]
    ratio: float


def cap_name(cap: int | None) -> str:
    """``8GiB``, ``none``."""
    return "none" if cap is None else f"{cap / GIB:g}GiB"


def _ours(form: str, percent: int, dense: str = "source") -> System:
    tail = "" if dense == "source" else f", dense {dense}"
    key = f"ours-{form}-{percent}" + ("" if dense == "source" else "-d8")
    label = f"conmoe-edge {form}, rate {percent} %{tail}"
    return System(key, label, "ours", form, percent / 100, dense)


SYSTEMS: dict[str, System] = {
    system.key: system
    for system in (
        System("transformers", "transformers bf16, resident", "transformers", "bf16"),
        System("offload", "transformers bf16, CPU and disk offload", "offload", "bf16"),
        System("llama-bf16", "llama.cpp BF16", "llama", "bf16"),
        System("llama-q8", "llama.cpp Q8_0", "llama", "Q8_0"),
        System("llama-q8-plain", "llama.cpp Q8_0, not repacked", "llama", "Q8_0", repack=False),
        System("llama-q4", "llama.cpp Q4_K_M", "llama", "Q4_K_M"),
        System("llama-q4-plain", "llama.cpp Q4_K_M, not repacked", "llama", "Q4_K_M", repack=False),
        *(_ours("bf16", percent) for percent in (0, 25, 50)),
        *(_ours("int8", percent, "int8") for percent in (0, 25, 50)),
        *(_ours("int4", percent, "int8") for percent in (0, 25, 50)),
        *(_ours("int4", percent) for percent in (0, 50)),
    )
}

GROUPS = ("whole", "half", "quarter", "4-bit", "8-bit")

CELLS: tuple[Cell, ...] = (
    Cell("transformers", None, "whole", needed=True),
    Cell("llama-bf16", None, "whole", needed=True),
    Cell("ours-bf16-0", None, "whole", needed=True),
    Cell("ours-bf16-0", 8 * GIB, "whole"),
    Cell("ours-bf16-0", 4 * GIB, "whole"),
    Cell("offload", 8 * GIB, "half", needed=True),
    Cell("llama-bf16", 8 * GIB, "half", needed=True),
    Cell("ours-bf16-50", 8 * GIB, "half", needed=True),
    Cell("ours-bf16-50", None, "half"),
    Cell("offload", 4 * GIB, "half"),
    Cell("llama-bf16", 4 * GIB, "half"),
    Cell("ours-bf16-50", 4 * GIB, "half"),
    Cell("ours-bf16-25", None, "quarter"),
    Cell("ours-bf16-25", 8 * GIB, "quarter"),
    Cell("ours-bf16-25", 4 * GIB, "quarter"),
    Cell("llama-q4", None, "4-bit", needed=True),
    Cell("ours-int4-0-d8", None, "4-bit", needed=True),
    Cell("llama-q4", 4 * GIB, "4-bit", needed=True),
    Cell("llama-q4-plain", 4 * GIB, "4-bit", needed=True),
    Cell("ours-int4-50-d8", 4 * GIB, "4-bit", needed=True),
    Cell("ours-int4-0", None, "4-bit"),
    Cell("ours-int4-0-d8", 4 * GIB, "4-bit"),
    Cell("ours-int4-25-d8", 4 * GIB, "4-bit"),
    Cell("ours-int4-50", 4 * GIB, "4-bit"),
    Cell("llama-q4", 8 * GIB, "4-bit"),
    Cell("ours-int4-0-d8", 8 * GIB, "4-bit"),
    Cell("llama-q8", None, "8-bit"),
    Cell("ours-int8-0-d8", None, "8-bit"),
    Cell("llama-q8", 8 * GIB, "8-bit"),
    Cell("llama-q8-plain", 8 * GIB, "8-bit"),
    Cell("ours-int8-0-d8", 8 * GIB, "8-bit"),
    Cell("llama-q8-plain", 4 * GIB, "8-bit"),
    Cell("ours-int8-25-d8", 4 * GIB, "8-bit"),
    Cell("ours-int8-50-d8", 4 * GIB, "8-bit"),
)

CLAIMS: tuple[Claim, ...] = (
    Claim(8 * GIB, "ours-bf16-50", ("offload",), 40),
    Claim(8 * GIB, "ours-bf16-50", ("llama-bf16",), 4),
    Claim(4 * GIB, "ours-int4-50-d8", ("llama-q4", "llama-q4-plain"), 1.5),
    Claim(None, "ours-bf16-0", ("transformers",), 1.7),
    Claim(None, "ours-bf16-0", ("llama-bf16",), 1.0),
    Claim(None, "ours-int4-0-d8", ("llama-q4",), 0.7),
)


def order(cells: Sequence[Cell], repeats: int, others: int) -> list[tuple[Cell, int]]:
    """Every (cell, repeat) of one group: there and back again, so that no system is always the first.

    Needed cells are repeated ``repeats`` times, the rest ``others`` times.
    """
    jobs: list[tuple[Cell, int]] = []
    for repeat in range(max(repeats, others)):
        row = [cell for cell in cells if repeat < (repeats if cell.needed else others)]
        jobs += [(cell, repeat) for cell in (row if repeat % 2 == 0 else reversed(row))]
    return jobs
