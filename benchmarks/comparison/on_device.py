"""Where an arm computes: its device, the cap on a GPU's memory, and what was used of it at the end.

``job["device"]`` is ``cpu`` (the default) or ``cuda``; ``job["device_bytes"]`` caps torch's allocator on a GPU, so that
an arm that needs more fails as it would on a smaller card. The context of CUDA is not in it, and is the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def device_of(job: Mapping[str, Any]) -> str:
    """``cpu`` or ``cuda``."""
    return str(job.get("device", "cpu"))


def limit(job: Mapping[str, Any]) -> None:
    """Before anything is loaded: hold torch to the job's share of the card."""
    if device_of(job) != "cuda":
        return
    torch.cuda.init()
    if job.get("device_bytes") is not None:
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["device_bytes"] / total))


def used(job: Mapping[str, Any]) -> dict[str, int]:
    """Most that torch held at once, and what the driver says is taken now, of all programs."""
    if device_of(job) != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"device_reserved": torch.cuda.max_memory_reserved(), "device_taken": total - free}
