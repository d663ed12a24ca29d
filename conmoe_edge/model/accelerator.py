"""Which accelerator this machine has for torch, and what memory it has: NVIDIA's, AMD's, Apple's, Intel's.

===========  ============  ========================================  ============================================
``--device`` torch's word  what runs there                           memory
===========  ============  ========================================  ============================================
``cuda``     ``cuda``      dense part, experts by Triton's kernels   NVML (``memory/machine.py``)
``hip``      ``cuda``      the same, by ROCm's builds of both        torch: of the card; an APU's is the RAM
``mps``      ``mps``       dense part and experts by torch           the RAM, up to what Metal recommends
``xpu``      ``xpu``       dense part and experts by torch           torch: of the card; on the chip the RAM
===========  ============  ========================================  ============================================

All but ``cuda`` are experimental: none has run on such hardware yet. Therefore one layer is compared with the
processor when a package is opened there (``integrations/device_check.py``), and ``auto`` never takes ``mps`` and
``xpu``; AMD's GPU it takes, since a torch that was built for ROCm is there for nothing else.

What a machine has is asked of torch. Raises ``UsageError`` for a device that is not here. Memory: torch's context on
the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch

from conmoe_edge.errors import UsageError
from conmoe_edge.memory.budget import Budget, DeviceWord
from conmoe_edge.memory.machine import GpuFacts, MachineFacts, measure_machine
from conmoe_edge.memory.resolve import resolve_budget

EXPERIMENTAL = {
    "hip": "AMD GPU (ROCm)",
    "mps": "Apple GPU (Metal)",
    "xpu": "Intel GPU",
}
"""Words of ``--device`` that no hardware has confirmed, and what they stand for."""

_ON_CPU = "--device cpu, and a --gpu SIZE that this machine's RAM holds"


def accelerator_here() -> str | None:
    """What torch can compute on beside the processor, as a word of ``--device``; ``None`` for nothing."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return None
    return "hip" if found.type == "cuda" and torch.version.hip else found.type


def experimental(device: torch.device) -> str | None:
    """The word of ``EXPERIMENTAL`` for a device of torch's; ``None`` for the others."""
    word = "hip" if device.type == "cuda" and torch.version.hip else device.type
    return word if word in EXPERIMENTAL else None


def device_named(word: str) -> torch.device:
    """torch's device for ``cpu``, ``cuda``, ``cuda:1``, ``hip``, ``mps``, ``xpu``.

    Raises:
        UsageError: this machine, or this torch, has none.
    """
    name, colon, index = word.partition(":")
    wanted = "cuda" if name == "hip" else name
    try:
        found = torch.device(wanted + colon + index)
    except RuntimeError as error:
        raise UsageError(f"{word!r} is no device.", "", "cpu, cuda, hip, mps or xpu") from error
    if wanted not in ("cuda", "mps", "xpu"):
        return found
    here = accelerator_here()
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "There is no GPU that torch can use here.",
            "the package was asked for on a GPU",
            _ON_CPU,
        )
    if here != name and not (name == "cuda" and here == "hip"):
        raise UsageError(f"This machine has no {name} device.", why_not(), _ON_CPU)
    if found.index is None and wanted != "mps":
        return torch.device(wanted, torch.accelerator.current_device_index())
    return found


def why_not() -> str:
    """What torch has here instead of the device that was asked for."""
    here = accelerator_here()
    if here is not None:
        return f"torch {torch.__version__} computes on {here} here"
    return f"torch {torch.__version__} finds nothing but the processor"


def facts_for(word: str) -> MachineFacts:
    """This machine, with the GPU that ``--device word`` means in the place of NVIDIA's where it is another one."""
    here = measure_machine()
    wanted = word if word in EXPERIMENTAL else None
    if wanted is None and word in ("auto", "cuda") and here.gpu is None and torch.version.hip:
        wanted = "hip"
    if wanted is None:
        return here
    if accelerator_here() != wanted:
        return replace(here, gpu=None, gpu_problem=why_not())
    return replace(here, gpu=gpu_facts(wanted, here))


def gpu_facts(word: str, here: MachineFacts) -> GpuFacts:
    """What torch says of the device ``word``, which is there."""
    if word == "mps":
        return apple_facts(torch.mps.recommended_max_memory(), here)
    module = torch.cuda if word == "hip" else torch.xpu
    device = torch.device(
        module.__name__.rpartition(".")[2], torch.accelerator.current_device_index()
    )
    free, total = torch.accelerator.get_memory_info(device)
    held = torch.accelerator.memory_reserved(device)
    shares = bool(getattr(module.get_device_properties(device), "is_integrated", False))
    return card_facts(word, module.get_device_name(device), free, total, held, shares, here)


def apple_facts(recommended: int, here: MachineFacts) -> GpuFacts:
    """An Apple GPU: ``recommended`` is what Metal lets it wire, about two thirds to three quarters of the RAM."""
    total = min(recommended, here.ram_limit)
    free = min(total, here.ram_usable)
    return GpuFacts("Apple GPU", total, free, 0, kind="mps", unified=True)


def card_facts(
    word: str, name: str, free: int, total: int, held: int, shares: bool, here: MachineFacts
) -> GpuFacts:
    """An AMD or Intel GPU from torch's figures in bytes: ``held`` by this process, ``shares`` the RAM."""
    kind = "cuda" if word == "hip" else "xpu"
    if shares:
        total = min(total, here.ram_limit)
        return GpuFacts(name, total, min(free, here.ram_usable), 0, kind=kind, unified=True)
    return GpuFacts(name, total, free, max(0, total - free - held), kind=kind)


def budget_here(asked: str, device: str | None) -> Budget:
    """``resolve_budget`` for a package that is opened on this machine; ``device`` as for ``load``.

    Raises:
        UsageError: as ``resolve_budget``.
    """
    known = device in get_args(DeviceWord)
    word: DeviceWord = device if known else "auto"  # type: ignore[assignment]
    return resolve_budget(asked, word, facts=facts_for(word))


def memory_used(device: torch.device, resident: int) -> int:
    """Bytes that this process holds on a device: ``resident`` RAM on the processor, torch's reserve on a GPU, both on
    Apple's, where they come from one pool.
    """
    if device.type == "cpu":
        return resident
    if device.type == "mps":
        return resident + torch.mps.driver_allocated_memory()
    module = torch.cuda if device.type == "cuda" else torch.xpu
    return module.memory_reserved(device)


def empty_cache(device: torch.device) -> None:
    """Give what torch keeps for later on a GPU back to its driver."""
    {"cuda": torch.cuda, "mps": torch.mps, "xpu": torch.xpu}[device.type].empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for what was issued to a device; on the processor nothing is left to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("mps", "xpu"):
        torch.accelerator.synchronize(device)
