"""What ``doctor`` says about the operating system: what it lacks and what that costs, how disks are read, and the GPUs
that are not NVIDIA's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from conmoe_edge.api.finding import Finding
from conmoe_edge.system_calls import direct_way, opened_directly, system_name
from conmoe_edge.units import human_size, path_text

if TYPE_CHECKING:
    from conmoe_edge.memory.machine import MachineFacts

LACKS: dict[str, tuple[tuple[str, str], ...]] = {
    "linux": (),
    "darwin": (
        (
            "lending",
            "the room of keys and values serves no prototypes until it is needed: fewer of them are resident",
        ),
        (
            "page cache",
            "what was read of a model larger than memory stays in it: other programs may be swapped out",
        ),
        ("templates", "a chat template's memory is not bounded, its time and length are"),
        (
            "compression",
            "memory beyond what is free is compressed and then swapped, not refused: answers get slow",
        ),
    ),
    "windows": (
        (
            "lending",
            "the room of keys and values serves no prototypes until it is needed: fewer of them are resident",
        ),
        (
            "page cache",
            "what was read of a model larger than memory stays in it until Windows needs the room",
        ),
        ("templates", "a chat template's memory is not bounded, its time and length are"),
        (
            "one reader",
            "records of one file are read one at a time: fast disks are not used in full",
        ),
        ("open files", "a package cannot be replaced or removed while chat or serve runs from it"),
    ),
}
"""What is missing on a system, or works otherwise there, and what it costs."""

_NAMES = {"linux": "Linux", "darwin": "macOS", "windows": "Windows"}
_PROBE = 4096


def system_findings(facts: MachineFacts, folder: Path) -> Iterator[Finding]:
    """What this system lacks, reads, limits and accelerators, in that order."""
    yield from lacking(system_name())
    yield reads_finding(folder)
    yield from limit_findings(facts)
    yield from accelerator_findings(facts)


def lacking(system: str) -> Iterator[Finding]:
    """A line for everything that ``system`` lacks; one for a system that nobody has tried."""
    if system not in LACKS:
        yield Finding("system", "info", f"{system}: nobody has tried this program there")
        return
    if LACKS[system]:
        yield Finding(
            "system", "info", f"{_NAMES[system]}: tested by the project's CI alone, not by hand"
        )
    for name, cost in LACKS[system]:
        yield Finding(name, "info", f"{_NAMES[system]}: {cost}")


def reads_finding(folder: Path) -> Finding:
    """Whether records can be read past the page cache here, by the system and by the disk of ``folder``."""
    way = direct_way()
    cost = "records that do not stay in memory cost the processor a copy, at about half the speed"
    if not way:
        return Finding("reads", "info", f"buffered: this system has no direct reads; {cost}")
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".conmoe-probe-") as file:
            file.write(bytes(_PROBE))
            file.flush()
            handle = opened_directly(file.fileno())
            if handle is not None:
                os.close(handle)
    except OSError as error:
        return Finding(
            "reads", "info", f"not tried in {path_text(folder)}: {error.strerror or error}"
        )
    if handle is None:
        return Finding(
            "reads", "info", f"buffered: the disk of {path_text(folder)} refuses {way}; {cost}"
        )
    return Finding("reads", "ok", f"direct ({way}) where records do not stay in memory")


def limit_findings(facts: MachineFacts) -> Iterator[Finding]:
    """What a system holds back of the RAM: page-locked memory, long paths."""
    if facts.gpu is not None and not facts.gpu.unified and facts.ram_lockable < facts.ram_usable:
        yield Finding(
            "page-locked",
            "info",
            f"{human_size(facts.ram_lockable)} of {human_size(facts.ram_usable)} of RAM serve the GPU as its "
            "second tier: Windows locks no more than half",
        )
    from conmoe_edge.checkpoint.fs.path_limits import MOST, TURN_ON, long_paths_enabled

    if not long_paths_enabled():
        yield Finding(
            "long paths",
            "warn",
            f"off: paths of more than {MOST} characters fail, also those of the hub's cache",
            f"as administrator: {TURN_ON}",
        )


def accelerator_findings(facts: MachineFacts) -> Iterator[Finding]:
    """A GPU that is not NVIDIA's: experimental, with the flag that takes it."""
    from conmoe_edge.model.accelerator import EXPERIMENTAL, accelerator_here, gpu_facts

    word = accelerator_here()
    if word not in EXPERIMENTAL:
        return
    gpu = gpu_facts(word, facts)
    shares = ", shared with the processor" if gpu.unified else ""
    yield Finding(
        "accelerator",
        "info",
        f"{EXPERIMENTAL[word]}: {gpu.name}, {human_size(gpu.total)}{shares}; experimental, never run on such hardware: "
        f"--device {word} compares one layer with the processor and refuses where it differs",
    )
