"""RAM as a tier between disk and GPU: whole records in page-locked host memory, so that a copy needs no detour.

Host memory that is merely read once already lies in the system's page cache, which costs nothing to keep and is given
up under pressure; this tier is only worth its memory because it is registered with CUDA, so that the GPU fetches from
it directly. Registered with ``cudaHostRegister`` on plain mappings: torch's own pinned allocator rounds to powers of
two.

Records are taken in the order that the caller gives until ``host_bytes`` are used. Where the system refuses to lock
memory (limits, some desktop drivers) there is no tier, and the page cache serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.offload.storage.record_store import RecordStore
from conmoe_edge.offload.storage.slot_pool import host_buffer


class HostTier:
    """Records in registered host memory, by prototype number. Read once, at start."""

    def __init__(self, store: RecordStore, numbers: Sequence[int], host_bytes: int) -> None:
        self._records: dict[int, Tensor] = {}
        self._memory: Tensor | None = None
        chosen, total = [], 0
        for number in numbers:
            nbytes = store.record_bytes(number)
            if total + nbytes > host_bytes:
                break
            chosen.append(number)
            total += nbytes
        if not chosen:
            return
        memory = host_buffer(total)
        if not _register(memory):
            return
        self._memory = memory
        start = 0
        for number in chosen:
            record = memory[start : start + store.record_bytes(number)]
            store.read_into(number, record)
            self._records[number] = record
            start += record.numel()

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return 0 if self._memory is None else self._memory.numel()

    @property
    def numbers(self) -> list[int]:
        """The prototypes whose records are held, in the order that was given."""
        return list(self._records)

    def record(self, number: int) -> Tensor | None:
        """The record's bytes, or ``None`` where the disk has to be asked."""
        return self._records.get(number)

    def close(self) -> None:
        """Unlock and forget; call only when no copy is under way."""
        self._records = {}
        if self._memory is not None:
            _cuda().cudaHostUnregister(self._memory.data_ptr())
            self._memory = None


def _register(memory: Tensor) -> bool:
    return int(_cuda().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0


def _cuda() -> Any:
    """CUDA's runtime library as torch loaded it."""
    return torch.cuda.cudart()
