"""Which errors say that memory ran out."""

from __future__ import annotations

import torch

from conmoe_edge.errors import OutOfMemory


def is_out_of_memory(error: BaseException) -> bool:
    """True for every way in which torch, Python and this program say that memory ran out."""
    if isinstance(error, (OutOfMemory, torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text
    )
