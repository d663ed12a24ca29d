"""How a record gets into its cache slot, and when compute may read it.

Three ways with one interface:

- ``DirectTransfer`` (CPU): worker threads read from disk straight into the cache slot.
- ``StagedTransfer`` (CUDA): worker threads read into a small ring of pinned staging buffers; a copy stream moves them
  to the cache slot. Events order it all: compute waits for *loaded*, the next copy into a cache slot waits for *free*.
  Records that ``HostTier`` holds in registered host memory skip disk, ring and threads: the caller issues their copies,
  unless they are read ahead.

- ``QueuedTransfer`` (other GPUs): worker threads read into a buffer of their own and copy to the cache slot by the
  device's one queue, which takes compute and copies in the order in which they are issued.

Reads ``ahead`` of any demand have a thread of their own and go one at a time, so that no more than the rest of one of
them stands in the way of a demand read; those that have not begun can be taken back with ``cancel``.

Loads that are begun one after the other wake one thread, and each thread that begins to read wakes the next one while
there is more to read: between two of them the computing thread would meet the one that it woke.

A caller says ``load`` when the policy gave a place, ``wait`` before the compute that reads it, ``used`` after that
compute was issued. ``counts`` says what was brought from which tier, and how long the caller stood in ``wait``. Memory:
the ring, ``RING_RECORDS`` records of pinned host memory on CUDA, a record for each thread on other GPUs, nothing on the
CPU. Errors of a read surface in
``wait``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from conmoe_edge.offload.storage.pinned_tier import HostTier
from conmoe_edge.offload.storage.place import Place
from conmoe_edge.offload.storage.record_store import RecordStore
from conmoe_edge.offload.storage.slot_pool import host_buffer

READERS = 3
"""Whole records at a time. Measured on a virtual disk with records of 12 and of 3 MiB, direct: one
reader reaches 1.2 GB/s, two 1.5, three and four no more; buffered, where the readers also copy,
three are the fastest. Reading one record in pieces by several readers took as long as by one.
"""
RING_RECORDS = 4


@dataclass(slots=True)
class TransferCounts:
    """What was asked for since the start or the last reset.

    Attributes:
        disk_bytes, host_bytes: of records brought from the disk, from the tier in host memory.
        waited_seconds: that the computing thread stood in ``wait``; what a GPU's stream waits for a
            copy is not in it.
    """

    disk_bytes: int = 0
    host_bytes: int = 0
    waited_seconds: float = 0.0

    def reset(self) -> None:
        """Count from zero."""
        self.disk_bytes = self.host_bytes = 0
        self.waited_seconds = 0.0


class Transfer(Protocol):
    """Moves records into slots."""

    @property
    def counts(self) -> TransferCounts:
        """What was brought, and the time spent in ``wait``."""
        ...

    def load(self, number: int, place: Place, target: Tensor, *, ahead: bool = False) -> None:
        """Begin to bring prototype ``number`` into ``target``, the bytes of ``place``."""

    def cancel(self, number: int, place: Place, target: Tensor) -> bool:
        """Take back a load that has not begun; False where it has."""
        ...

    def ready(self, place: Place) -> bool:
        """Whether compute that is issued now would wait for nothing."""
        ...

    def wait(self, place: Place) -> None:
        """Return once compute that is issued from now on will see the place's record."""

    def used(self, place: Place) -> None:
        """Compute that reads the place has been issued; the place may be given to another record
        after it.
        """

    def drain(self) -> None:
        """Wait for every load that has begun, whatever became of it."""

    def close(self) -> None:
        """Drain and let the threads go."""


class _Read:
    """A record on its way. Lighter than a future: one thread waits for it, and an answer begins one for each miss.

    ``over``: whether it was read, or failed.
    """

    __slots__ = ("_ended", "_error", "_job", "over")

    def __init__(self, job: Callable[[], None]) -> None:
        self.over = False
        self._job: Callable[[], None] | None = job
        self._error: BaseException | None = None
        self._ended = threading.Lock()  # held until it is over
        self._ended.acquire()

    def run(self) -> None:
        """Read; called once."""
        job, self._job = self._job, None
        assert job is not None, "it is run once"
        try:
            job()
        except BaseException as error:
            self._error = error
        self.over = True
        self._ended.release()

    def give_up(self) -> None:
        """It is over without having been run."""
        self._error, self.over = CancelledError(), True
        self._ended.release()

    def wait(self) -> None:
        """Until it is over."""
        if not self.over:
            with self._ended:
                pass

    def result(self) -> None:
        """Raises what it failed with; it is over."""
        error, self._error = self._error, None
        if error is not None:
            raise error


class _Reading:
    """Threads that run reads in the order in which they were begun."""

    def __init__(self, threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self._waiting: deque[_Read] = deque()  # its methods are one step for other threads
        self._called = False  # whether a thread was woken that has not looked yet

    def begin(self, read: _Read) -> None:
        """Run it when a thread is free."""
        self._waiting.append(read)
        if not self._called:
            self._called = True
            self._threads.submit(self._run)

    def take_back(self, read: _Read) -> bool:
        """Whether it had not begun; then it does not."""
        try:
            self._waiting.remove(read)
        except ValueError:
            return False
        return True

    def close(self) -> None:
        """Wait for what has begun; the rest does not."""
        while self._waiting:
            with suppress(IndexError):  # a thread was quicker
                self._waiting.popleft().give_up()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self) -> None:
        self._called, woken = False, False
        while True:
            try:
                read = self._waiting.popleft()
            except IndexError:
                return
            if self._waiting and not woken:
                woken = True
                with suppress(RuntimeError):  # the threads are being let go
                    self._threads.submit(self._run)
            read.run()


class _ThreadedTransfer:
    """What both ways have in common: reads by threads, under way by place."""

    def __init__(self, store: RecordStore, readers: int) -> None:
        self.counts = TransferCounts()
        self._store = store
        self._reading = _Reading(readers, "conmoe-read")
        self._ahead: _Reading | None = None  # made when it is first needed
        self._reads: dict[Place, _Read] = {}

    def ready(self, place: Place) -> bool:
        read = self._reads.get(place)
        return read is None or read.over

    def wait(self, place: Place) -> None:
        read = self._reads.pop(place, None)
        if read is None:
            return
        if not read.over:
            before = time.perf_counter()
            read.wait()
            self.counts.waited_seconds += time.perf_counter() - before
        read.result()

    def used(self, place: Place) -> None:
        """Nothing to do: on a CPU the compute is over when the call returns."""

    def drain(self) -> None:
        for read in self._reads.values():
            read.wait()
        self._reads.clear()

    def close(self) -> None:
        self._reading.close()
        if self._ahead is not None:
            self._ahead.close()

    def _start(self, place: Place, job: Callable[[], None], *, ahead: bool) -> None:
        if ahead and self._ahead is None:
            self._ahead = _Reading(1, "conmoe-ahead")
        reading = self._ahead if ahead and self._ahead is not None else self._reading
        read = self._reads[place] = _Read(job)
        reading.begin(read)

    def _take_back(self, place: Place) -> bool:
        """Whether the read had not begun; then it does not. A copy that no thread makes has."""
        read = self._reads.get(place)
        ways = (self._reading, self._ahead)
        if read is None or not any(one is not None and one.take_back(read) for one in ways):
            return False
        del self._reads[place]
        return True


class DirectTransfer(_ThreadedTransfer):
    """CPU: disk to cache slot."""

    def __init__(self, store: RecordStore, readers: int = READERS) -> None:
        super().__init__(store, readers)

    def load(self, number: int, place: Place, target: Tensor, *, ahead: bool = False) -> None:
        self.counts.disk_bytes += target.numel()
        self._start(place, lambda: self._store.read_into(number, target), ahead=ahead)

    def cancel(self, number: int, place: Place, target: Tensor) -> bool:
        cancelled = self._take_back(place)
        if cancelled:
            self.counts.disk_bytes -= target.numel()
        return cancelled


class QueuedTransfer(_ThreadedTransfer):
    """Other GPUs: disk to host memory to cache slot, one copy at a time.

    Compute that reads the place was issued before ``load``, and the copy is issued after it, to the same queue: so it
    waits. ``copy_`` from pageable memory returns when the bytes are out of the buffer.
    """

    def __init__(self, store: RecordStore, largest_record: int, readers: int = READERS) -> None:
        super().__init__(store, readers)
        self._largest = largest_record
        self._buffers = threading.local()
        self._copies = threading.Lock()

    def load(self, number: int, place: Place, target: Tensor, *, ahead: bool = False) -> None:
        self.counts.disk_bytes += target.numel()
        self._start(place, lambda: self._bring(number, target), ahead=ahead)

    def cancel(self, number: int, place: Place, target: Tensor) -> bool:
        cancelled = self._take_back(place)
        if cancelled:
            self.counts.disk_bytes -= target.numel()
        return cancelled

    def _bring(self, number: int, target: Tensor) -> None:
        buffer = getattr(self._buffers, "record", None)
        if buffer is None:
            buffer = self._buffers.record = host_buffer(self._largest)
        staged = buffer[: target.numel()]
        self._store.read_into(number, staged)
        with self._copies, torch.inference_mode():
            target.copy_(staged)


class StagedTransfer(_ThreadedTransfer):
    """CUDA: disk or host memory to cache slot by way of a copy stream."""

    def __init__(
        self,
        store: RecordStore,
        device: torch.device,
        largest_record: int,
        host: HostTier | None = None,
        readers: int = READERS,
    ) -> None:
        super().__init__(store, readers)
        self._device = device
        self._host = host
        self._stream = torch.cuda.Stream(device)
        self._loaded: dict[Place, torch.cuda.Event] = {}
        self._free: dict[Place, torch.cuda.Event] = {}
        # Free events that loads by threads have taken: the next load waits for them if this one is taken back.
        self._taken: dict[Place, torch.cuda.Event] = {}
        self._ring: SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = SimpleQueue()
        for _ in range(RING_RECORDS):
            self._ring.put((torch.empty(largest_record, dtype=torch.uint8, pin_memory=True), None))

    def load(self, number: int, place: Place, target: Tensor, *, ahead: bool = False) -> None:
        held = None if self._host is None else self._host.record(number)
        self._count(held, target.numel())
        # Taken here, on the caller's thread: the compute that still reads the place was issued
        # before this load.
        free = self._free.pop(place, None)
        self._taken.pop(place, None)
        if held is not None and not ahead:
            # Issuing a copy takes no longer than handing it to a thread, and nothing is waited for.
            self._loaded[place] = self._copy(held, target, free)
            return
        if free is not None:
            self._taken[place] = free
        self._start(place, lambda: self._bring(number, place, target, held, free), ahead=ahead)

    def cancel(self, number: int, place: Place, target: Tensor) -> bool:
        cancelled = self._take_back(place)
        free = self._taken.pop(place, None)
        if cancelled:
            if free is not None:
                self._free[place] = free
            held = None if self._host is None else self._host.record(number)
            self._count(held, -target.numel())
        return cancelled

    def _count(self, held: Tensor | None, nbytes: int) -> None:
        if held is None:
            self.counts.disk_bytes += nbytes
        else:
            self.counts.host_bytes += nbytes

    def ready(self, place: Place) -> bool:
        if not super().ready(place):
            return False
        loaded = self._loaded.get(place)
        return loaded is None or loaded.query()

    def wait(self, place: Place) -> None:
        super().wait(place)
        loaded = self._loaded.pop(place, None)
        if loaded is not None:
            torch.cuda.current_stream(self._device).wait_event(loaded)

    def used(self, place: Place) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._free[place] = event

    def drain(self) -> None:
        super().drain()
        self._stream.synchronize()
        self._loaded.clear()

    def close(self) -> None:
        super().close()
        self._stream.synchronize()

    def _bring(
        self,
        number: int,
        place: Place,
        target: Tensor,
        held: Tensor | None,
        free: torch.cuda.Event | None,
    ) -> None:
        if held is not None:
            self._loaded[place] = self._copy(held, target, free)
            return
        buffer, last_copy = self._ring.get()
        event = last_copy
        try:
            if last_copy is not None:
                last_copy.synchronize()  # the ring's buffer may still be on its way to another place
            staged = buffer[: target.numel()]
            self._store.read_into(number, staged)
            event = self._copy(staged, target, free)
            self._loaded[place] = event
        finally:
            self._ring.put((buffer, event))

    def _copy(
        self, source: Tensor, target: Tensor, free: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if free is not None:
                self._stream.wait_event(free)
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event
