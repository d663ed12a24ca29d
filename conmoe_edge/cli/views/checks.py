"""What ``doctor`` looks at, apart from the GPU: each check reads one thing and says it in one line,
with a fix where it is wrong.

A check never raises for what it finds and never prints. ``all_checks`` runs them in the order in
which a user reads them; the ones that need torch import it when they run.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conmoe_edge.units import GIB, gib, human_size

if TYPE_CHECKING:
    from conmoe_edge.memory.machine import MachineFacts

Status = Literal["ok", "info", "warn", "fail"]
DISTRIBUTION = "conmoe-edge"
_LITTLE_RAM, _LITTLE_DISK = 2 * GIB, 5 * GIB
_PROBE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. ``fix`` is a command or an action, and is empty where nothing is wrong."""

    name: str
    status: Status
    text: str
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as plain JSON."""
        return asdict(self)


def all_checks(folder: Path, *, disk_speed: bool = False) -> Iterator[Check]:
    """Every finding about this machine; ``folder`` is where packages will lie."""
    from conmoe_edge.cli.views.checks_gpu import gpu_checks
    from conmoe_edge.memory.machine import measure_machine

    facts = measure_machine(folder)
    yield python_check()
    yield from package_checks()
    yield from gpu_checks(facts.gpu_problem)
    yield cpu_check()
    yield memory_check(facts)
    yield disk_check(folder)
    if disk_speed:
        yield disk_speed_check(folder)
    yield bitsandbytes_check()
    yield hub_check()
    yield operator_check()
    if _cuda_is_there():
        yield gpu_operator_check()
    yield config_check()


def _cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def python_check() -> Check:
    """This Python against the range that the package declares."""
    from packaging.specifiers import SpecifierSet

    found = ".".join(str(part) for part in sys.version_info[:3])
    try:
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        wanted = ""
    if found not in SpecifierSet(wanted):
        return Check(
            "python", "fail", f"{found}, but {wanted} is needed", f"install Python {wanted}"
        )
    return Check("python", "ok", f"{found} ({sys.executable})")


def package_checks() -> Iterator[Check]:
    """The packages we depend on against the tested ranges; torch and transformers by name, the rest
    in one line.
    """
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Check(
            "packages",
            "warn",
            "conmoe-edge runs from a folder and is not installed: versions are not checked",
            "pip install -e .",
        )
        return
    fine = 0
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        check = _package(requirement.name, requirement.specifier)
        if check.status != "ok" or requirement.name in ("torch", "transformers"):
            yield check
        else:
            fine += 1
    yield Check("packages", "ok", f"{fine} more, all in the tested range")


def _package(name: str, wanted: Any) -> Check:
    install = f'pip install "{name}{wanted}"'
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", install)
    if not wanted.contains(found, prereleases=True):
        return Check(name, "fail", f"{found}, tested is {wanted}", install)
    return Check(name, "ok", f"{found} (tested: {wanted})" if wanted else found)


def cpu_check() -> Check:
    """What the CPU can do for bf16 arithmetic, and how many threads there are."""
    try:
        import torch
    except Exception as error:
        return Check(
            "cpu",
            "fail",
            f"torch cannot be imported: {error}",
            "pip install --force-reinstall torch",
        )
    level = torch.backends.cpu.get_cpu_capability()
    flags = _cpu_flags()
    extras = [name for name in ("avx512_bf16", "amx_bf16", "avx512_vnni", "bf16") if name in flags]
    text = f"{os.cpu_count()} processors, {torch.get_num_threads()} threads, {level}"
    text += (
        f" with {', '.join(extras)}"
        if extras
        else ", no bf16 instructions (bf16 is slower than it could be)"
    )
    return Check("cpu", "ok" if extras else "info", text)


def _cpu_flags() -> set[str]:
    """Instruction sets that the kernel lists; empty where it lists none (macOS, Windows)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def memory_check(facts: MachineFacts) -> Check:
    """Free RAM, and the limit of the container if that is what counts."""
    text = f"{gib(facts.ram_usable)} free of {gib(facts.ram_total)}"
    if facts.cgroup_limit is not None and facts.cgroup_limit < facts.ram_total:
        text += f", this container may use {gib(facts.cgroup_limit)}"
    if facts.ram_usable < _LITTLE_RAM:
        return Check("ram", "warn", text, "close other programs, or take a smaller --gpu")
    return Check("ram", "ok", text)


def disk_check(folder: Path) -> Check:
    """Free space where packages will lie."""
    from conmoe_edge.cli.commands.plan import free_disk
    from conmoe_edge.cli.ui.text import path_text

    free = free_disk(folder)
    if free is None:
        return Check(
            "disk", "fail", f"{folder} cannot be read", "take another folder: doctor --folder DIR"
        )
    text = f"{human_size(free)} free in {path_text(folder)}"
    if free < _LITTLE_DISK:
        return Check(
            "disk", "warn", text, "free some space, or write to another disk with --out DIR"
        )
    return Check("disk", "ok", text)


def disk_speed_check(folder: Path) -> Check:
    """Sequential reads of a file that was just written and dropped from the page cache."""
    fix = "take another folder: doctor --folder DIR"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".conmoe-probe-") as file:
            block = os.urandom(1 << 20)
            for _ in range(_PROBE_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            dropped = hasattr(os, "posix_fadvise")
            if dropped:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            while file.read(4 << 20):
                pass
            speed = _PROBE_BYTES / (time.perf_counter() - start)
    except OSError as error:
        return Check("disk speed", "warn", f"not measured: {error.strerror or error}", fix)
    text = f"{human_size(int(speed))}/s reading {human_size(_PROBE_BYTES)}"
    if not dropped:
        return Check(
            "disk speed", "info", f"{text}, perhaps from memory: this system cannot drop its cache"
        )
    if speed < 200 << 20:
        return Check(
            "disk speed",
            "warn",
            f"{text}: experts that are not resident will be slow",
            "put packages on an SSD",
        )
    return Check("disk speed", "ok", text)


def bitsandbytes_check() -> Check:
    """Whether the 4-bit kernels can be imported at all."""
    try:
        import bitsandbytes
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Check(
            "bitsandbytes",
            "warn",
            f"cannot be imported ({reason[0]}); only 4-bit prototypes need it",
            "pip install --upgrade bitsandbytes",
        )
    return Check("bitsandbytes", "ok", str(bitsandbytes.__version__))


def hub_check() -> Check:
    """Where downloaded models lie, how many there are, and whether the hub may be asked."""
    from huggingface_hub import constants

    from conmoe_edge.cli.ui.text import path_text

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    text = f"{path_text(cache)}, {models} model{'' if models == 1 else 's'}"
    nearest = next((p for p in (cache, *cache.parents) if p.exists()), cache)
    if not os.access(nearest, os.W_OK):
        return Check(
            "hub cache", "warn", f"{text}, not writable", "set HF_HOME to a folder of yours"
        )
    if constants.HF_HUB_OFFLINE:
        return Check("hub cache", "info", f"{text}; HF_HUB_OFFLINE is set: only these can be used")
    return Check("hub cache", "ok", text)


def operator_check() -> Check:
    """Whether the operator for few tokens on a processor compiles and computes what it should."""
    from conmoe_edge.offload.kernels.cpu.bindings import operator, why_not

    fix = "install a C++ compiler with OpenMP: apt install g++, or xcode-select --install"
    made = operator()
    return _operator("cpu operator", made and made.name, why_not(), fix)


def gpu_operator_check() -> Check:
    """The same of the operator for one token on a GPU."""
    import torch

    from conmoe_edge.offload.kernels.triton.launch import gpu_operator, why_not

    device = torch.device("cuda", torch.cuda.current_device())
    made = gpu_operator(device)
    return _operator("gpu operator", made and made.name, why_not(device), "pip install triton")


def _operator(name: str, made: str | None, why_not: str, fix: str) -> Check:
    if made:
        return Check(name, "ok", made)
    reason = why_not.strip().partition("\n")[0]
    return Check(name, "warn", f"torch's kernels instead, which are slower ({reason})", fix)


def config_check() -> Check:
    """The folder of the user's own profiles, and whether all of them can be read."""
    from conmoe_edge.cli.ui.text import path_text
    from conmoe_edge.errors import UsageError
    from conmoe_edge.memory.profiles import list_profiles, user_folder

    folder = user_folder()
    try:
        own = sum(profile.origin != "shipped" for profile in list_profiles())
    except UsageError as error:
        return Check("profiles", "fail", f"{error.what} {error.why}".strip(), error.fix)
    return Check("profiles", "ok", f"{own} of your own in {path_text(folder)}")
