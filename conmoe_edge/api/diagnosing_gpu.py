"""What ``doctor`` says about GPUs: driver and torch build, free memory, and the processes that hold the rest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from conmoe_edge.api.finding import Finding
from conmoe_edge.units import human_size

_GET_TORCH = "https://pytorch.org/get-started/locally"
_SHOWN_PROCESSES = 3


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as its driver reports it; ``users`` are (name, pid, bytes), the largest first, 0
    where unknown.
    """

    name: str
    total: int
    free: int
    users: tuple[tuple[str, int, int], ...]


def gpu_findings(problem: str) -> Iterator[Finding]:
    """The driver's GPUs beside what torch can use; ``problem`` says why there is none to use."""
    try:
        import torch
    except Exception:
        return  # the finding about the CPU says so
    gpus, driver = read_gpus()
    build = torch.version.cuda
    if not gpus:
        usable = torch.cuda.is_available()
        if usable:
            yield Finding(
                "gpu", "ok", f"{torch.cuda.get_device_name(0)} (the driver's library was not found)"
            )
        else:
            yield Finding(
                "gpu", "info", f"{problem or 'no GPU'}: models run on the CPU, RAM is the budget"
            )
        return
    if build is None:
        yield Finding(
            "cuda",
            "warn",
            f"driver {driver}, but torch {torch.__version__} was built without CUDA: "
            "the GPU is not used",
            f"install the CUDA build of torch: {_GET_TORCH}",
        )
    elif not torch.cuda.is_available():
        yield Finding(
            "cuda",
            "fail",
            f"torch was built for CUDA {build}, and driver {driver} does not run it",
            f"update the driver, or install a torch for an older CUDA: {_GET_TORCH}",
        )
    else:
        yield Finding("cuda", "ok", f"driver {driver}, torch for CUDA {build}")
        yield from _architecture()
    if sys.platform == "win32":
        yield Finding(
            "gpu spill",
            "info",
            "this driver may move GPU memory to RAM without a word, which is very slow",
            "NVIDIA Control Panel, CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback",
        )
    for index, gpu in enumerate(gpus):
        yield _memory(index, gpu)


def _architecture() -> Iterator[Finding]:
    """Whether this torch has kernels for the GPU's generation."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    built = torch.cuda.get_arch_list()
    # Kernels of the same major generation run, and so does any older PTX.
    fits = any(a.startswith(f"sm_{major}") for a in built) or any("compute_" in a for a in built)
    if built and not fits:
        yield Finding(
            "gpu kernels",
            "fail",
            f"this torch has no kernels for compute capability {major}.{minor}",
            f"install a torch that lists it: {_GET_TORCH}",
        )


def _memory(index: int, gpu: Gpu) -> Finding:
    text = f"{gpu.name}: {human_size(gpu.free)} free of {human_size(gpu.total)}"
    if gpu.users:
        shown = ", ".join(
            f"{name} (pid {pid}{f', {human_size(used)}' if used else ''})"
            for name, pid, used in gpu.users[:_SHOWN_PROCESSES]
        )
        more = len(gpu.users) - _SHOWN_PROCESSES
        text += f"; used by {shown}{f' and {more} more' if more > 0 else ''}"
    if gpu.free < gpu.total // 2:
        return Finding(
            f"gpu {index}",
            "warn",
            text,
            "close what holds the memory, or plan with --gpu and the free size",
        )
    return Finding(f"gpu {index}", "ok", text)


def read_gpus() -> tuple[list[Gpu], str]:
    """Every GPU and the version of the driver, from NVML; an empty list where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], ""
    try:
        count = pynvml.nvmlDeviceGetCount()
        gpus = [_read(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
        return gpus, _string(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return [], ""
    finally:
        pynvml.nvmlShutdown()


def _read(handle: object) -> Gpu:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    users = []
    for list_processes in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        try:
            found = list_processes(handle)
        except pynvml.NVMLError:
            continue  # not every driver tells
        users += [(_process_name(p.pid), p.pid, int(p.usedGpuMemory or 0)) for p in found]
    unique = sorted(set(users), key=lambda user: (-user[2], user[1]))
    return Gpu(
        _string(pynvml.nvmlDeviceGetName(handle)),
        int(memory.total),
        int(memory.free),
        tuple(unique),
    )


def _process_name(pid: int) -> str:
    import psutil

    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "another user's process"


def _string(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
