"""From the user's word to a ``Budget``: a size, a profile, or this machine.

``--gpu`` names the *target*, which need not be this machine: with a size and no ``--device`` the
target is taken to be like this machine (its GPU if it has one, its RAM if not); a profile brings
its own device. The bandwidths of a target like this machine are measured where a ``Meter`` is given
(``bandwidth.py``); a package that is only opened needs none.
Raises ``UsageError`` for a number without a unit, an unknown profile, or words that contradict each
other.
"""

from __future__ import annotations

import re
from dataclasses import replace

from conmoe_edge.errors import UsageError
from conmoe_edge.memory.bandwidth import Meter
from conmoe_edge.memory.budget import Budget, DeviceKind, DeviceWord, kind_of
from conmoe_edge.memory.machine import GpuFacts, MachineFacts, measure_machine
from conmoe_edge.memory.profiles import Profile, get_profile
from conmoe_edge.units import MIB, human_size, parse_size

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# What "auto" leaves to others, who go on working beside us: a tenth of the RAM that is free now; on
# a GPU less, since there only the desktop may grow and fragments of the allocator are the larger
# part.
_RAM_SHARE_LEFT = 0.10
_GPU_SHARE_LEFT = 0.02
_GPU_LEFT_AT_LEAST = 256 * MIB


def resolve_budget(
    asked: str,
    device: DeviceWord = "auto",
    *,
    facts: MachineFacts | None = None,
    meter: Meter | None = None,
) -> Budget:
    """The budget that ``asked`` means; without ``facts`` this machine is looked at where needed,
    and with a ``meter`` a target like this machine gets its bandwidths. Of GPUs that are not NVIDIA's ``facts`` has
    to know (``model/accelerator.py``).
    """
    word = asked.strip()
    size = parse_size(word)
    if word.lower() == "auto":
        known = facts or measure_machine()
        return _with_rates(_from_machine(device, known), known, meter)
    if size is not None:
        if size == 0:
            raise UsageError(
                f"--gpu {asked} leaves no memory at all.",
                "",
                "--gpu 8GB, or --gpu auto for this machine",
            )
        known = facts or measure_machine()
        return _with_rates(_from_size(word, size, device, known), known, meter)
    if _NUMBER.fullmatch(word):
        raise UsageError(
            f"{word} what? --gpu {word} has no unit.",
            "it might mean bytes, GB or GiB",
            f"--gpu {word}GB (decimal) or --gpu {word}GiB (binary)",
        )
    return _from_profile(get_profile(word), device)


def _with_rates(budget: Budget, facts: MachineFacts, meter: Meter | None) -> Budget:
    """The budget with the bandwidths that it lacks, as far as this machine can stand for it."""
    if meter is None or (budget.device != "cpu" and facts.gpu is None):
        return budget
    disk = budget.disk_bandwidth or meter.disk()
    if facts.gpu is not None and budget.device != "cpu" and not facts.gpu.unified:
        return replace(budget, disk_bandwidth=disk)
    memory = budget.device_bandwidth or meter.memory()
    return replace(budget, device_bandwidth=memory, link_bandwidth=disk, disk_bandwidth=disk)


def _from_size(asked: str, size: int, device: str, facts: MachineFacts) -> Budget:
    """A size on a target that is taken to be like this machine."""
    kind = _kind(device, facts)
    if kind == "cpu":
        here = ""
        if size > facts.ram_limit:
            here = f"this machine has only {human_size(facts.ram_limit)}"
        elif size > facts.ram_usable:
            here = f"only {human_size(facts.ram_usable)} of this machine's {human_size(facts.ram_limit)} are free"
        note = f"you asked for {asked} = {human_size(size)} of RAM"
        return Budget("cpu", size, asked, note, host_bytes=0, here=here, measured=True)
    note = f"you asked for {asked} = {human_size(size)} of GPU memory"
    gpu = _gpu_of(kind, facts)
    if gpu is None:
        here = "this machine has no GPU, so the target is another one"
        if kind != "cuda" or device == "hip":
            here = f"this machine has no {device} device, so the target is another one"
        host = 0 if kind == "mps" else None
        return Budget(kind, size, asked, note, host_bytes=host, here=here, measured=True)
    if gpu.unified:
        most = min(gpu.total, facts.ram_usable)
        here = f"the {gpu.name} here shares the RAM and may take {human_size(gpu.total)}"
        here += f", {human_size(most)} can be had now" * (size > most)
        return replace(_gpu_budget(size, asked, note, gpu, facts, others=0), here=here)
    here = f"the {gpu.name} here has {human_size(gpu.total)}, {human_size(gpu.used_by_others)} in use by others"
    if size > gpu.total:
        here += ", which is less than you asked for"
    elif size > gpu.total - gpu.used_by_others:
        here += ", so not all of it is free now"
    return replace(_gpu_budget(size, asked, note, gpu, facts, others=0), here=here)


def _from_machine(device: str, facts: MachineFacts) -> Budget:
    """Everything that is free here now, less a share for others."""
    if _kind(device, facts) == "cpu":
        usable = int(facts.ram_usable * (1 - _RAM_SHARE_LEFT))
        others = max(0, facts.ram_limit - facts.ram_usable)
        note = f"nine tenths of the {human_size(facts.ram_usable)} of RAM that are free on this machine"
        if facts.cgroup_limit is not None and facts.cgroup_limit < facts.ram_total:
            note += f" inside its limit of {human_size(facts.cgroup_limit)}"
        if usable <= 0:
            raise UsageError(
                "There is no free RAM on this machine.",
                "",
                "Close other programs, or give --gpu SIZE",
            )
        return Budget(
            "cpu", usable, "auto", note, host_bytes=0, in_use_by_others=others, measured=True
        )
    gpu = _gpu_of(_kind(device, facts), facts)
    if gpu is None:
        raise UsageError(
            "This machine has no GPU to measure."
            if device in ("auto", "cuda")
            else f"This machine has no {device} device.",
            facts.gpu_problem,
            "--device cpu for its RAM, or name the target: --gpu rtx-4090 (any profile or size)",
        )
    if gpu.unified:
        return _from_shared(gpu, facts)
    free = gpu.total - gpu.used_by_others
    usable = free - max(_GPU_LEFT_AT_LEAST, int(free * _GPU_SHARE_LEFT))
    if usable <= 0:
        raise UsageError(
            f"The {gpu.name} has no free memory.",
            f"other processes hold {human_size(gpu.used_by_others)}",
            "Close them, or use --device cpu",
        )
    note = f"the {gpu.name} has {human_size(gpu.total)}, {human_size(gpu.used_by_others)} in use by others"
    note += "; a margin is kept"
    return _gpu_budget(usable, "auto", note, gpu, facts, others=gpu.used_by_others)


def _from_shared(gpu: GpuFacts, facts: MachineFacts) -> Budget:
    """A GPU whose memory is the RAM: what is free, less a share for others, and no more than the GPU may take."""
    usable = min(gpu.total, int(facts.ram_usable * (1 - _RAM_SHARE_LEFT)))
    if usable <= 0:
        raise UsageError(
            f"There is no free memory for the {gpu.name}.",
            "it shares the RAM with the processor",
            "Close other programs, or give --gpu SIZE",
        )
    note = f"the {gpu.name} shares the RAM: it may take {human_size(gpu.total)}, and nine tenths of the "
    note += f"{human_size(facts.ram_usable)} that are free are used"
    others = max(0, facts.ram_limit - facts.ram_usable)
    return _gpu_budget(usable, "auto", note, gpu, facts, others=others)


def _from_profile(profile: Profile, device: str) -> Budget:
    """A profile's figures as they stand."""
    if device not in ("auto", profile.device):
        raise UsageError(
            f"--gpu {profile.name} and --device {device} contradict each other.",
            f"that profile computes on {profile.device}",
            f"Leave out --device, or give a size: --gpu 8GB --device {device}",
        )
    on_cpu = profile.device == "cpu"
    note = f"profile {profile.name}: {human_size(profile.memory)} of {'RAM' if on_cpu else 'GPU memory'}"
    note += f" less {human_size(profile.reserve)} for the system"
    return Budget(
        device=profile.device,
        device_bytes=profile.usable,
        asked=profile.name,
        source=note,
        host_bytes=0 if on_cpu else profile.host_memory,
        device_bandwidth=profile.memory_bandwidth,
        link_bandwidth=profile.disk_bandwidth if on_cpu else profile.link_bandwidth,
        disk_bandwidth=profile.disk_bandwidth,
    )


def _gpu_budget(
    size: int, asked: str, note: str, gpu: GpuFacts, facts: MachineFacts, *, others: int
) -> Budget:
    return Budget(
        device=gpu.kind,
        device_bytes=size,
        asked=asked,
        source=note,
        host_bytes=0 if gpu.unified else facts.ram_lockable,
        device_bandwidth=gpu.memory_bandwidth,
        link_bandwidth=gpu.link_bandwidth,
        in_use_by_others=others,
        measured=True,
    )


def _kind(device: str, facts: MachineFacts) -> DeviceKind:
    """``auto`` is the GPU where there is one."""
    if device == "cpu" or (device == "auto" and facts.gpu is None):
        return "cpu"
    if device == "auto" and facts.gpu is not None:
        return facts.gpu.kind
    return kind_of(device)


def _gpu_of(kind: DeviceKind, facts: MachineFacts) -> GpuFacts | None:
    """This machine's GPU, where it is of that kind."""
    return facts.gpu if facts.gpu is not None and facts.gpu.kind == kind else None
