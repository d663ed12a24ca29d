"""Which errors say that memory ran out."""

from __future__ import annotations

import torch

from conmoe_edge.errors import OutOfMemory

_WORDS = (
    "can't allocate memory",
    "out of memory",
    "could not create a primitive",
    "Invalid buffer size",
)
"""The third is oneDNN's, which says no more where it finds no memory for a product. Its thread cannot make any product
of a new shape afterwards, so that only a new process goes on. The last is torch's on an Apple GPU, for more than Metal
gives at once.
"""


def is_out_of_memory(error: BaseException) -> bool:
    """True for every way in which torch, its libraries, Python and this program say that memory ran out."""
    if isinstance(error, (OutOfMemory, torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)
