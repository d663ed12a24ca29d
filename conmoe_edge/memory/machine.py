"""What this machine has: RAM, the limits of its control group, cores, GPU, disk. No torch.

Nothing is timed here, only read: the plan becomes part of a package, and a plan that follows the
mood of a stopwatch would differ between a run and its resumption.
Out: a frozen ``MachineFacts``. What cannot be read is ``None``, and ``gpu_problem``
says why no GPU was found.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from conmoe_edge.memory.budget import DeviceKind
from conmoe_edge.memory.cgroup import cgroup_memory
from conmoe_edge.memory.system_limits import commit_left, lockable, obtainable
from conmoe_edge.system_calls import system_name

# Bytes per second and lane, by PCIe generation, and the part of it that large pinned copies reach.
_PCIE_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.56e9}
_PCIE_EFFICIENCY = 0.85


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """The first GPU that may be used here. ``used_by_others`` holds the driver's own share too.

    ``kind`` is torch's word for it (``cuda`` for AMD's as well); ``unified`` says that its memory is the RAM, so that
    ``total`` is the most of it that the GPU may take, and nothing of that is counted twice.
    """

    name: str
    total: int
    free: int
    used_by_others: int
    driver: str = ""
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    kind: DeviceKind = "cuda"
    unified: bool = False


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """This machine, in bytes. ``cgroup_*`` are ``None`` where no limit is set."""

    ram_total: int
    ram_available: int
    cgroup_limit: int | None
    cgroup_available: int | None
    physical_cores: int
    gpu: GpuFacts | None
    gpu_problem: str
    disk_free: int
    system: str = "linux"

    @property
    def ram_lockable(self) -> int:
        """RAM that this process may have page-locked for a GPU's copies."""
        return lockable(self.system, self.ram_total, self.ram_usable)

    @property
    def ram_limit(self) -> int:
        """The most RAM that this process could ever have."""
        return (
            self.ram_total if self.cgroup_limit is None else min(self.ram_total, self.cgroup_limit)
        )

    @property
    def ram_usable(self) -> int:
        """RAM that this process can have now: free in the machine and inside every limit."""
        if self.cgroup_available is None:
            return self.ram_available
        return min(self.ram_available, self.cgroup_available)


def measure_machine(folder: Path | None = None) -> MachineFacts:
    """Read this machine; ``disk_free`` is of the disk that holds, or would hold, ``folder``."""
    memory = psutil.virtual_memory()
    limit = cgroup_memory()
    gpu, problem = _first_gpu()
    return MachineFacts(
        ram_total=memory.total,
        ram_available=obtainable(system_name(), memory.available, commit_left()),
        cgroup_limit=limit.limit if limit else None,
        cgroup_available=limit.available if limit else None,
        physical_cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        gpu=gpu,
        gpu_problem=problem,
        disk_free=disk_free(folder or Path()),
        system=system_name(),
    )


def disk_free(folder: Path) -> int:
    """Free bytes on the disk of ``folder``, or of its nearest parent that exists."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def disk_free_if_readable(folder: Path) -> int | None:
    """The same, ``None`` where it cannot be read."""
    try:
        return disk_free(folder)
    except OSError:
        return None


def _first_gpu() -> tuple[GpuFacts | None, str]:
    """The GPU that CUDA would call 0, by NVML, or the reason why there is none.

    NVML takes no notice of ``CUDA_VISIBLE_DEVICES``, so its first entry is looked up here.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    entry = wanted.split(",")[0].strip() if wanted is not None else "0"
    if entry in ("", "-1"):
        return None, f"CUDA_VISIBLE_DEVICES={wanted!r} hides every GPU"
    try:
        import pynvml
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"no NVIDIA driver answers ({error})"
    try:
        by_index = entry.isdigit()
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(entry))
            if by_index
            else pynvml.nvmlDeviceGetHandleByUUID(entry)
        )
        return _gpu_facts(pynvml, handle), ""
    except pynvml.NVMLError as error:
        return None, f"the GPU {entry} cannot be read ({error})"
    finally:
        pynvml.nvmlShutdown()


def _gpu_facts(nvml, handle) -> GpuFacts:
    """Read one device; ``nvml`` is the module, a parameter so that a test can be the driver."""
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    total, free = int(memory.total), int(memory.free)
    return GpuFacts(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total=total,
        free=free,
        used_by_others=max(0, total - free - _own_bytes(nvml, handle)),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        memory_bandwidth=_gpu_memory_bandwidth(nvml, handle),
        link_bandwidth=_gpu_link_bandwidth(nvml, handle),
    )


def _own_bytes(nvml, handle) -> int:
    """Device memory that this process holds; 0 where the driver does not say (Windows)."""
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return 0
    return sum(
        int(process.usedGpuMemory or 0) for process in processes if process.pid == os.getpid()
    )


def _gpu_memory_bandwidth(nvml, handle) -> float | None:
    """Two transfers a clock over the whole bus: the data-sheet figure for GDDR and HBM alike."""
    try:
        clock = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)  # MHz
        bits = nvml.nvmlDeviceGetMemoryBusWidth(handle)
    except nvml.NVMLError:
        return None
    return 2.0 * clock * 1e6 * bits / 8 or None


def _gpu_link_bandwidth(nvml, handle) -> float | None:
    """The slot's lanes at their best rate (an idle card reports a slower current one)."""
    try:
        generation = nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
        lanes = nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
    except nvml.NVMLError:
        return None
    rate = _PCIE_LANE.get(generation)
    return rate * lanes * _PCIE_EFFICIENCY if rate and lanes else None


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
