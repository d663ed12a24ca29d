"""The runtime of a loaded package: ``model.conmoe``.

It owns the files, the cache slots, the transfer and the backend that the layers compute with; it knows the budget,
counts what happens and can give memory back. Memory on the device: the slot pools, one weight matrix of scratch.
Raises ``PackageError`` for damaged records and ``OutOfMemory`` where the slots cannot be had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import add
from pathlib import Path

import psutil
import torch

from conmoe_edge.checkpoint.format.manifest import USUAL_CHUNK, Manifest
from conmoe_edge.errors import OutOfMemory
from conmoe_edge.memory.budget import Budget
from conmoe_edge.memory.heap import return_large_blocks
from conmoe_edge.model.accelerator import empty_cache, memory_used
from conmoe_edge.offload.compute.backend import ExpertBackend, backend_maker
from conmoe_edge.offload.compute.experts_forward import LayerHandle
from conmoe_edge.offload.compute.torch_backend import Arithmetic
from conmoe_edge.offload.fastpath.kv_cache import STEP_TOKENS
from conmoe_edge.offload.fastpath.report import FastPathReport
from conmoe_edge.offload.residency.kv_lending import Lending
from conmoe_edge.offload.residency.policies import default_settings
from conmoe_edge.offload.residency.prefetch import Prefetcher, reads_ahead
from conmoe_edge.offload.residency.quota import halved
from conmoe_edge.offload.residency.residency import Residency
from conmoe_edge.offload.simulate.load_settings import settings_for
from conmoe_edge.offload.storage.out_of_memory import is_out_of_memory
from conmoe_edge.offload.storage.pinned_tier import HostTier
from conmoe_edge.offload.storage.read_mode import choose_read_mode, free_memory
from conmoe_edge.offload.storage.record_store import RecordStore
from conmoe_edge.offload.storage.slot_pool import SlotPool, can_shrink
from conmoe_edge.offload.storage.transfer import (
    DirectTransfer,
    QueuedTransfer,
    StagedTransfer,
    Transfer,
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RuntimeStats:
    """What happened since the start or the last reset, and what is held now.

    Attributes:
        hits, misses: prototypes that were resident when a layer asked for them, or had to be read.
        bytes_read: bytes of records that were brought to the device.
        prototypes: how many the package has.
        resident: how many of them the slots hold at once.
        slots, slot_bytes: the cache slots and their memory.
        memory_used: of this process on the device now (resident memory on a CPU, torch's reserve on a GPU, both where
            the GPU's memory is the RAM).
        memory_budget: the budget's ceiling; ``None`` where none was given.
        device: ``cpu``, ``cuda:0``.
        disk_bytes, host_bytes: the parts of ``bytes_read`` that came from the disk, and from the tier in host memory.
        waited_seconds: that computing stood still for records.
        read_mode: how the disk is read: ``buffered`` or ``direct``.
        policy: who stays in the slots, by name.
        kernel: what computes a few rows.
        prefetched, prefetch_used: prototypes that were read ahead of the layer that might ask for them, and those of
            them that were asked for while they were there.
        host_computed: of the ``misses``, those that the processor computed instead of copying them to a GPU.
    """

    hits: int
    misses: int
    bytes_read: int
    prototypes: int
    resident: int
    slots: int
    slot_bytes: int
    memory_used: int
    memory_budget: int | None
    device: str
    disk_bytes: int = 0
    host_bytes: int = 0
    waited_seconds: float = 0.0
    read_mode: str = ""
    policy: str = ""
    kernel: str = ""
    prefetched: int = 0
    prefetch_used: int = 0
    host_computed: int = 0

    @property
    def resident_share(self) -> float:
        """Share of the prototypes that the slots hold at once."""
        return self.resident / self.prototypes if self.prototypes else 1.0

    @property
    def hit_rate(self) -> float:
        """Share of the requests that found their prototype resident; 1 before the first request."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


class Runtime:
    """Built once a model, after its dense weights are loaded.

    Attributes:
        residency: the prototypes that are on the device; another one after a retreat.
        backend: what the layers compute with, for this residency.
        closed: whether memory, threads and files were given back.
        fast_path: which way single tokens take, layer by layer; ``None`` before it was installed.
    """

    residency: Residency
    backend: ExpertBackend
    fast_path: FastPathReport | None = None

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        handles: Sequence[LayerHandle],
        device: torch.device,
        *,
        budget: Budget | None = None,
        context: int,
        prefill_chunk: int,
        slots: Sequence[int],
        cache_policy: str | None = None,
        misses: str = "copy",
        cache_bytes: Callable[[int], int] | None = None,
        kv_precision: str = "source",
        progress: Progress | None = None,
    ) -> None:
        """Allocate the slots and read what they hold.

        Args:
            folder: the package.
            manifest: its manifest, verified.
            handles: one a layer; they get the backend.
            device: where the compute happens.
            budget: what may be used, for the account and for the tier in host memory.
            context: tokens that the key-value cache is planned for.
            prefill_chunk: most tokens of one forward.
            slots: cache slots of every record layout.
            cache_policy: instead of what the package's trace finds best.
            misses: with a GPU, whether the processor may compute what is not there (``miss_split.py``).
            cache_bytes: of the key-value cache at so many tokens, where the room that is kept for it may serve as cache
                slots until it is needed.
            kv_precision: how that cache is kept, ``source`` or ``int8``.
            progress: called with (records read, records to read) at start.
        """
        self.folder = folder
        self.manifest = manifest
        self.device = device
        self.budget = budget
        self.context = context
        self.prefill_chunk = prefill_chunk
        if device.type == "cpu":
            return_large_blocks()
        self._process = psutil.Process()
        self.closed = False
        self._filled = False  # whether there are slots to compute with
        self.cache_bytes, self.kv_precision, self.misses = cache_bytes, kv_precision, misses
        self._handles = tuple(handles)
        self._before = (0,) * 5  # ``_counts`` of residencies that were given up
        self._slots = tuple(slots)
        self._cache_policy = cache_policy
        self._lending: Lending | None = None
        if cache_bytes is not None and can_shrink(device):
            counts = Counter(entry.layout for entry in manifest.prototypes)
            self._lending = Lending(
                cache_bytes,
                context,
                STEP_TOKENS,
                [
                    (layout.nbytes, max(0, counts[i] - self._slots[i]))
                    for i, layout in enumerate(manifest.layouts)
                ],
            )
            # What a prompt needs beyond that is given back when it comes: most are shorter than the longest chunk.
            self._lending.allow(min(prefill_chunk, USUAL_CHUNK))
        everything = sum(
            manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes
        ) <= sum(n * layout.nbytes for n, layout in zip(self._slots, manifest.layouts, strict=True))
        # On a CPU the page cache lies in the memory that the budget is about: no second copy there.
        self._store = RecordStore(
            folder,
            manifest.prototypes,
            manifest.layouts,
            keep_cached=device.type != "cpu" or not everything,
        )
        self._host: HostTier | None = None
        try:
            self._transfer = self._make_transfer()
            self._make_backend = backend_maker(
                device, self._host if misses == "auto" else None, manifest
            )
            self._fill_slots(progress)
        except BaseException:
            if hasattr(self, "_transfer"):
                self._transfer.close()  # no thread may read from a file that is closed
            self._store.close()
            raise

    @property
    def arithmetic(self) -> Arithmetic:
        """What computes single experts on this device."""
        return self.backend.arithmetic

    def stats(self) -> RuntimeStats:
        """The counters and what is held now."""
        hits, misses, read, prefetched, used = self._counts()
        moved = self._transfer.counts
        return RuntimeStats(
            hits=hits,
            misses=misses,
            bytes_read=read,
            prototypes=len(self.manifest.prototypes),
            resident=self.residency.resident_count if self._filled else 0,
            slots=self.residency.slots if self._filled else 0,
            slot_bytes=self.residency.nbytes if self._filled else 0,
            memory_used=self._memory_used(),
            memory_budget=None if self.budget is None else self.budget.device_bytes,
            device=str(self.device),
            disk_bytes=moved.disk_bytes,
            host_bytes=moved.host_bytes,
            waited_seconds=moved.waited_seconds,
            read_mode=self._store.mode,
            policy=", ".join(sorted({one.policy for one in self.residency.settings})),
            kernel=self.backend.name,
            prefetched=prefetched,
            prefetch_used=used,
            host_computed=self.backend.uncounted()[1],
        )

    def reset_stats(self) -> None:
        """Count from zero."""
        self._before = (0,) * 5
        self.residency.reset_counts()
        self.backend.reset_counts()
        self._transfer.counts.reset()

    def make_room(self, tokens: int) -> None:
        """Before the key-value cache grows to ``tokens`` tokens: give back the slots in its room. Where memory ran out
        so far that there are none, they are made again.

        Raises:
            OutOfMemory: they cannot be had.
        """
        if not self._filled and not self.closed and not self._refill():
            raise OutOfMemory(
                "There is no memory for the fewest cache slots.",
                "something else holds it",
                "Close other programs, and ask again",
            )
        if self._lending is not None and self._lending.allow(tokens):
            self.residency.shrink(self._all_slots())
            self._decide_prefetch(self.residency)

    def retreat(self) -> bool:
        """After memory ran out: go on with half the slots. False where nothing can be given up.

        The caller must have let go of the error first; its traceback holds on to the memory.
        """
        while (fewer := halved(self._slots)) is not None:
            self._lending = None
            self._slots = fewer
            if self._refill():
                return True
        return False

    @contextmanager
    def reference(self) -> Iterator[Residency | None]:
        """Within it the prototypes on the processor, read once more from the files into one slot of each layout;
        ``None`` for a model that has none.
        """
        if not self.manifest.prototypes:
            yield None
            return
        used = {entry.layout for entry in self.manifest.prototypes}
        slots = tuple(int(layout in used) for layout in range(len(self.manifest.layouts)))
        pools = [
            SlotPool(layout, count, torch.device("cpu"))
            for layout, count in zip(self.manifest.layouts, slots, strict=True)
        ]
        transfer = DirectTransfer(self._store, readers=1)
        residency = Residency(
            self.manifest, pools, transfer, default_settings(self.manifest, slots)
        )
        try:
            residency.preload()
            yield residency
        finally:
            residency.close()
            transfer.close()

    def close(self) -> None:
        """Give memory, threads and files back; the model cannot compute afterwards."""
        if self.closed:
            return
        self.closed = True
        self._give_up_slots()
        self._transfer.close()
        if self._host is not None:
            self._host.close()
        self._store.close()

    def _counts(self) -> tuple[int, ...]:
        """Hits, misses, bytes read, prefetched, prefetches that were used; since the last reset."""
        now, (hits, aside) = self.residency, self.backend.uncounted()
        counts = (now.hits + hits, now.misses + aside, now.bytes_read, *now.prefetched)
        return tuple(before + one for before, one in zip(self._before, counts, strict=True))

    def _make_transfer(self) -> Transfer:
        if self.device.type == "cpu" or not self.manifest.prototypes:
            return DirectTransfer(self._store)
        largest = max(layout.nbytes for layout in self.manifest.layouts)
        if self.device.type != "cuda":
            return QueuedTransfer(self._store, largest)
        host_bytes = 0 if self.budget is None else self.budget.host_bytes or 0
        by_weight = sorted(
            range(len(self.manifest.prototypes)),
            key=lambda n: (-self.manifest.prototypes[n].weight, n),
        )
        if sum(self._slots) < len(by_weight):
            self._host = HostTier(self._store, by_weight, host_bytes)
        return StagedTransfer(self._store, self.device, largest, self._host)

    def _refill(self) -> bool:
        """Slots as many as are wanted now, instead of those that there are; whether they could be had."""
        self._give_up_slots()
        try:
            self._fill_slots(None)
        except (RuntimeError, MemoryError, OutOfMemory) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _fill_slots(self, progress: Progress | None) -> None:
        """A residency and its backend, for the layers to compute with."""
        pools = self._make_pools()
        settings = settings_for(self.folder, self.manifest, self._slots, self._cache_policy)
        residency = Residency(self.manifest, pools, self._transfer, settings)
        try:
            self._decide_prefetch(residency)
            choose_read_mode(
                self._store,
                stays=residency.resident_count == residency.count,
                spare_bytes=free_memory(),
            )
            residency.preload(progress)
            backend = self._make_backend(residency)
            for handle in self._handles:
                handle.use(backend)
        except BaseException:
            for handle in self._handles:
                handle.use(None)
            residency.close()
            raise
        self.residency, self.backend = residency, backend
        self._filled = True

    def _give_up_slots(self) -> None:
        """Close the residency; what it has counted stays."""
        if not self._filled:
            return
        self._filled = False
        self._before = self._counts()
        self.backend.reset_counts()
        self.residency.reset_counts()
        for handle in self._handles:
            handle.use(None)
        self.residency.close()
        if self.device.type != "cpu":
            empty_cache(self.device)

    def _make_pools(self) -> list[SlotPool]:
        """Pools of the present number of slots, or of fewer where even those cannot be had."""
        while True:
            pools: list[SlotPool] = []
            try:
                for layout, count in zip(self.manifest.layouts, self._all_slots(), strict=True):
                    pools.append(SlotPool(layout, count, self.device))
                return pools
            except OutOfMemory:
                for pool in pools:
                    pool.close()
                if self._lending is not None:
                    self._lending = None
                    continue
                fewer = halved(self._slots)
                if fewer is None:
                    raise
                self._slots = fewer

    def _decide_prefetch(self, residency: Residency) -> None:
        """Whether to read ahead depends on how many prototypes are there now, in lent slots too."""
        share = residency.resident_count / residency.count if residency.count else 1.0
        if not reads_ahead(self.manifest, share):
            residency.prefetcher = None
        elif residency.prefetcher is None:
            residency.prefetcher = Prefetcher(self.folder, self.manifest, self.device)
        if self.manifest.prefetch is not None:
            residency.most_ahead = self.manifest.prefetch.depth

    def _all_slots(self) -> tuple[int, ...]:
        """The planned slots of every layout, and those that are lent."""
        if self._lending is None or self._lending.slots is None:
            return self._slots
        return tuple(map(add, self._slots, self._lending.slots))

    def _memory_used(self) -> int:
        resident = self._process.memory_info().rss
        return memory_used(self.device, resident)
