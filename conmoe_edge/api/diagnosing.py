"""``doctor``: what this machine has and what is wrong with it. The GPU's part is in ``diagnosing_gpu.py``,
the operating system's in ``diagnosing_system.py``.

Each finding reads one thing and says it in one line, with a fix where it is wrong; it is never raised. Those that need
torch or another package import it when they run, so that what is missing can be said.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conmoe_edge.api.finding import Finding
from conmoe_edge.extras import install_command
from conmoe_edge.system_calls import drop_from_cache
from conmoe_edge.units import GIB, human_size, path_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from conmoe_edge.memory.machine import MachineFacts

DISTRIBUTION = "conmoe-edge"
_LITTLE_RAM, _LITTLE_DISK = 2 * GIB, 5 * GIB
_PROBE_BYTES = 256 << 20


def doctor(
    folder: str | Path = ".", *, disk_speed: bool = False, model: PreTrainedModel | None = None
) -> tuple[Finding, ...]:
    """What this machine has and what is wrong with it, each with its fix.

    Args:
        folder: where packages will lie.
        disk_speed: also measure how fast it reads; writes 256 MiB for a moment.
        model: a loaded package; also say which way its single tokens take.
    """
    return tuple(findings(Path(folder), disk_speed=disk_speed, model=model))


def findings(
    folder: Path, *, disk_speed: bool = False, model: PreTrainedModel | None = None
) -> Iterator[Finding]:
    """The same, one after the other as they are found."""
    from conmoe_edge.api.diagnosing_gpu import gpu_findings
    from conmoe_edge.api.diagnosing_system import system_findings
    from conmoe_edge.memory.machine import measure_machine

    facts = measure_machine(folder)
    yield python_finding()
    yield from package_findings()
    yield from gpu_findings(facts.gpu_problem)
    yield from system_findings(facts, folder)
    yield cpu_finding()
    yield waiting_finding()
    yield memory_finding(facts)
    yield disk_finding(folder)
    if disk_speed:
        yield disk_speed_finding(folder)
    yield bitsandbytes_finding()
    yield hub_finding()
    yield operator_finding()
    yield listed_finding()
    if _cuda_is_there():
        yield gpu_operator_finding()
    if model is not None:
        yield from fast_path_findings(model)
    yield config_finding()


def _cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def python_finding() -> Finding:
    """This Python against the range that the package declares."""
    from packaging.specifiers import SpecifierSet

    found = ".".join(str(part) for part in sys.version_info[:3])
    try:
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        wanted = ""
    if found not in SpecifierSet(wanted):
        return Finding(
            "python", "fail", f"{found}, but {wanted} is needed", f"install Python {wanted}"
        )
    return Finding("python", "ok", f"{found} ({sys.executable})")


def package_findings() -> Iterator[Finding]:
    """The packages we depend on against the tested ranges; torch and transformers by name, the rest
    in one line.
    """
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding(
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
        found = _package(requirement.name, requirement.specifier)
        if found.status != "ok" or requirement.name in ("torch", "transformers"):
            yield found
        else:
            fine += 1
    yield Finding("packages", "ok", f"{fine} more, all in the tested range")


def _package(name: str, wanted: Any) -> Finding:
    install = f'pip install "{name}{wanted}"'
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "fail", "not installed", install)
    if not wanted.contains(found, prereleases=True):
        return Finding(name, "fail", f"{found}, tested is {wanted}", install)
    return Finding(name, "ok", f"{found} (tested: {wanted})" if wanted else found)


def cpu_finding() -> Finding:
    """What the CPU can do for bf16 arithmetic, and how many threads there are."""
    try:
        import torch
    except Exception as error:
        return Finding(
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
    return Finding("cpu", "ok" if extras else "info", text)


def waiting_finding() -> Finding:
    """Whether threads that wait for each other stay awake for long, which other busy programs make very slow."""
    from conmoe_edge.waiting_threads import POLICY_VARIABLE, SPIN_VARIABLE, TURNS, how_threads_wait

    how = how_threads_wait()
    if not sys.platform.startswith("linux"):
        return Finding("waiting", "info", "as torch's OpenMP does it; it is bounded on Linux only")
    if how == "bounded":
        return Finding("waiting", "ok", f"threads stay awake for {TURNS} turns at the most")
    if how == "user":
        said = ", ".join(
            f"{name}={os.environ[name]}"
            for name in (POLICY_VARIABLE, SPIN_VARIABLE)
            if name in os.environ
        )
        return Finding("waiting", "info", f"threads wait as the environment says: {said}")
    return Finding(
        "waiting",
        "warn",
        "torch was imported before conmoe_edge, so threads stay awake for long: beside busy programs answers may "
        "become many times slower",
        f"import conmoe_edge before torch, or set {POLICY_VARIABLE}=PASSIVE",
    )


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


def memory_finding(facts: MachineFacts) -> Finding:
    """Free RAM, and the limit of the container if that is what counts."""
    text = f"{human_size(facts.ram_usable)} free of {human_size(facts.ram_total)}"
    if facts.cgroup_limit is not None and facts.cgroup_limit < facts.ram_total:
        text += f", this container may use {human_size(facts.cgroup_limit)}"
    if facts.ram_usable < _LITTLE_RAM:
        return Finding("ram", "warn", text, "close other programs, or take a smaller --gpu")
    return Finding("ram", "ok", text)


def disk_finding(folder: Path) -> Finding:
    """Free space where packages will lie."""
    from conmoe_edge.memory.machine import disk_free_if_readable

    free = disk_free_if_readable(folder)
    if free is None:
        return Finding(
            "disk", "fail", f"{folder} cannot be read", "take another folder: doctor --folder DIR"
        )
    text = f"{human_size(free)} free in {path_text(folder)}"
    if free < _LITTLE_DISK:
        return Finding(
            "disk", "warn", text, "free some space, or write to another disk with --out DIR"
        )
    return Finding("disk", "ok", text)


def disk_speed_finding(folder: Path) -> Finding:
    """Sequential reads of a file that was just written and dropped from the page cache."""
    fix = "take another folder: doctor --folder DIR"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".conmoe-probe-") as file:
            block = os.urandom(1 << 20)
            for _ in range(_PROBE_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            dropped = drop_from_cache(file.fileno())
            file.seek(0)
            start = time.perf_counter()
            while file.read(4 << 20):
                pass
            speed = _PROBE_BYTES / (time.perf_counter() - start)
    except OSError as error:
        return Finding("disk speed", "warn", f"not measured: {error.strerror or error}", fix)
    text = f"{human_size(int(speed))}/s reading {human_size(_PROBE_BYTES)}"
    if not dropped:
        return Finding(
            "disk speed", "info", f"{text}, perhaps from memory: this system cannot drop its cache"
        )
    if speed < 200 << 20:
        return Finding(
            "disk speed",
            "warn",
            f"{text}: experts that are not resident will be slow",
            "put packages on an SSD",
        )
    return Finding("disk speed", "ok", text)


def bitsandbytes_finding() -> Finding:
    """Whether the 4-bit kernels can be imported at all."""
    try:
        import bitsandbytes
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Finding(
            "bitsandbytes",
            "warn",
            f"cannot be imported ({reason[0]}); only 4-bit prototypes need it",
            "pip install --upgrade bitsandbytes",
        )
    return Finding("bitsandbytes", "ok", str(bitsandbytes.__version__))


def hub_finding() -> Finding:
    """Where downloaded models lie, how many there are, and whether the hub may be asked."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    text = f"{path_text(cache)}, {models} model{'' if models == 1 else 's'}"
    nearest = next((p for p in (cache, *cache.parents) if p.exists()), cache)
    if not os.access(nearest, os.W_OK):
        return Finding(
            "hub cache", "warn", f"{text}, not writable", "set HF_HOME to a folder of yours"
        )
    if constants.HF_HUB_OFFLINE:
        return Finding(
            "hub cache", "info", f"{text}; HF_HUB_OFFLINE is set: only these can be used"
        )
    return Finding("hub cache", "ok", text)


def operator_finding() -> Finding:
    """Whether the operator for few tokens on a processor is there and computes what it should; its instruction set, and
    the compiler, or the wheel, that it is from.
    """
    from conmoe_edge.offload.kernels.cpu.bindings import operator_library, why_not

    found = operator_library()
    text = None if found is None else f"native, {found.level}, {found.made_by}"
    return _operator("cpu operator", text, why_not(), install_command("compile"))


def listed_finding() -> Finding:
    """Whether the classes that the fast path serves are, in the installed transformers, the code that was checked."""
    import transformers

    from conmoe_edge.compat import TRANSFORMERS
    from conmoe_edge.offload.fastpath.supported import installed_digests

    found = installed_digests()
    others = [name for name, (_, known) in found.items() if not known]
    text = f"{len(found) - len(others)} of {len(found)} classes of transformers {transformers.__version__}"
    if not others:
        return Finding("fast path", "ok", f"{text} are the code that was checked")
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return Finding(
        "fast path",
        "warn",
        f"{text} are the code that was checked; slower: {', '.join(others[:3])}{more}",
        f"pip install 'transformers{TRANSFORMERS}'",
    )


def gpu_operator_finding() -> Finding:
    """The same of the operator for one token on a GPU."""
    import torch

    from conmoe_edge.offload.kernels.triton.launch import gpu_operator, why_not

    device = torch.device("cuda", torch.cuda.current_device())
    made = gpu_operator(device)
    return _operator("gpu operator", made and made.name, why_not(device), "pip install triton")


def _operator(name: str, made: str | None, why_not: str, fix: str) -> Finding:
    if made:
        return Finding(name, "ok", made)
    reason = why_not.strip().partition("\n")[0]
    # A reason that knows its own fix says it in brackets at its end.
    why, bracket, own = reason.rpartition(" (")
    if bracket and own.endswith(")"):
        reason, fix = why, own[:-1]
    return Finding(name, "warn", f"torch's kernels instead, which are slower ({reason})", fix)


def fast_path_findings(model: PreTrainedModel) -> Iterator[Finding]:
    """Which way single tokens take through a loaded package; nothing where that is not known."""
    runtime: Any = model.conmoe
    fast_path = runtime.fast_path
    if fast_path is not None:
        yield Finding("this model", "info", fast_path.summary)


def config_finding() -> Finding:
    """The folder of the user's own profiles, and whether all of them can be read."""
    from conmoe_edge.errors import UsageError
    from conmoe_edge.memory.profiles import list_profiles, user_folder

    folder = user_folder()
    try:
        own = sum(profile.origin != "shipped" for profile in list_profiles())
    except UsageError as error:
        return Finding("profiles", "fail", f"{error.what} {error.why}".strip(), error.fix)
    return Finding("profiles", "ok", f"{own} of your own in {path_text(folder)}")
