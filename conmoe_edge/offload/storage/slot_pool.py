"""The device memory of the runtime: one uint8 pool per record layout, cut into cache slots of one record each.

A pool is allocated once, before anything else competes for the memory, and never grows, so the budget is known to the
byte and nothing fragments; on Linux its end can be given back (``shrink``). On the CPU the pool is an anonymous
mapping: page-aligned, so that a record can be read from disk straight into its slot, and touched at once, so that
missing memory shows at start and not in the middle of an answer. On a GPU it is one tensor of torch's allocator.

Records are multiples of 64 bytes and their parts start 64-aligned, so every typed view is aligned as well. Raises
``OutOfMemory`` where the pool cannot be had.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import RecordLayout
from conmoe_edge.checkpoint.format.records import view
from conmoe_edge.errors import OutOfMemory
from conmoe_edge.offload.storage.out_of_memory import is_out_of_memory
from conmoe_edge.offload.storage.stored_expert import StoredExpert
from conmoe_edge.units import human_size, round_up

_PAGE = 4096
# Python maps shared by default, which the system accounts as files and rarely backs with huge pages.
_PRIVATE: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)
_HUGE_FROM = 64 << 20  # below this, whole huge pages waste more than they save


class SlotPool:
    """``slots`` buffers of one record each on ``device``; ``nbytes`` of memory."""

    def __init__(self, layout: RecordLayout, slots: int, device: torch.device) -> None:
        self.layout = layout
        self.slots = slots
        self.device = device
        self.nbytes = slots * layout.nbytes
        self._mapping: mmap.mmap | None = None
        self._memory: Tensor | None = self._allocate()
        self._records: list[Tensor | None] = [None] * slots
        self._experts: list[StoredExpert | None] = [None] * slots

    def record(self, slot: int) -> Tensor:
        """The raw bytes of a slot: uint8 [record bytes]; a view, made once a slot.

        Raises:
            RuntimeError: the pool is closed, or does not have the slot.
        """
        if self._memory is None or not 0 <= slot < self.slots:
            raise RuntimeError(f"cache slot {slot} of {self.slots} is not there")
        record = self._records[slot]
        if record is None:
            start = slot * self.layout.nbytes
            record = self._records[slot] = self._memory[start : start + self.layout.nbytes]
        return record

    def parts(self, slot: int) -> StoredExpert:
        """The record in a slot as compute takes it; views, made once a slot."""
        expert = self._experts[slot]
        if expert is None:
            expert = self._experts[slot] = StoredExpert(view(self.layout, self.record(slot)))
        return expert

    def shrink(self, slots: int) -> None:
        """Give the memory of the slots from number ``slots`` on back to the system; their views must not be used any
        more.

        Raises:
            RuntimeError: the device cannot (``can_shrink``), or there are fewer slots.
        """
        if not can_shrink(self.device) or slots > self.slots:
            raise RuntimeError(
                f"{self.slots} cache slots on {self.device} do not shrink to {slots}"
            )
        end, self.nbytes = self.nbytes, slots * self.layout.nbytes
        self.slots = slots
        del self._experts[slots:], self._records[slots:]
        start = round_up(self.nbytes, mmap.PAGESIZE)
        if self._mapping is not None and start < end:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Give the memory back; views that are still held keep it alive."""
        self._experts, self._records = [], []
        self._memory = self._mapping = None

    def _allocate(self) -> Tensor:
        nbytes, device = self.nbytes, self.device
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=device)
        if device.type != "cpu":
            try:
                return torch.empty(nbytes, dtype=torch.uint8, device=device)
            except RuntimeError as error:  # torch has a class for it on some devices only
                if not is_out_of_memory(error):
                    raise
                raise _no_memory(nbytes, str(device)) from error
        self._mapping, memory = _mapped(nbytes, touch=True)
        return memory


def can_shrink(device: torch.device) -> bool:
    """Whether a pool on ``device`` can give its end back while the rest is in use."""
    return device.type == "cpu" and sys.platform.startswith("linux")


def host_buffer(nbytes: int, *, touch: bool = True) -> Tensor:
    """Page-aligned uint8 memory on the host, outside the C heap: what is given back goes back to the system. Without
    ``touch`` it takes memory only as it is written to.
    """
    return _mapped(nbytes, touch=touch)[1]


def _mapped(nbytes: int, *, touch: bool) -> tuple[mmap.mmap, Tensor]:
    try:
        mapping = mmap.mmap(-1, nbytes, **_PRIVATE)
    except (OSError, ValueError, OverflowError) as error:
        raise _no_memory(nbytes, "cpu") from error
    if nbytes >= _HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    if touch:
        memory[::_PAGE] = 0
    return mapping, memory


def _no_memory(nbytes: int, device: str) -> OutOfMemory:
    return OutOfMemory(
        f"{human_size(nbytes)} for the prototypes could not be allocated on {device}.",
        "something else holds the memory, or the budget is larger than what is free",
        "Close other programs or give a smaller --gpu.",
    )
