"""Which way records are read: through the page cache, or directly into their slots.

What was read once through the page cache is there for the next time, at the speed of memory, as
long as the system has memory to spare for it. Where it has not, the cache costs a copy by the
processor for every record and keeps nothing: direct reads then bring about twice as much per second
(two cores, virtual disk, records of 12 MiB: 1.4 against 0.7 GB/s). So:

- a model that is read again and again and whose files fit beside everything else is read buffered;
- otherwise a few records are read each way, for about ``MOST_SECONDS``, and records are read
  directly unless the other way is clearly faster, as it is where the page cache happens to hold the
  files already. Near a tie, direct reads leave the processor to the compute.

The choice changes speed and never a byte. Memory: one buffer of the largest record, for the time of
the measurement.
"""

from __future__ import annotations

import time

import psutil

from conmoe_edge.memory.cgroup import cgroup_memory
from conmoe_edge.offload.storage.record_store import RecordStore
from conmoe_edge.offload.storage.slot_pool import host_buffer

MOST_SECONDS = 0.3
PAIRS = 4
CLEARLY = 1.5
WORTH_MEASURING = 256 << 20
"""Bytes of all records: what is read in a fraction of a second whichever way needs no choice."""


def choose_read_mode(store: RecordStore, *, stays: bool, spare_bytes: int) -> None:
    """Set the way in which ``store`` reads.

    Args:
        store: with its files open.
        stays: every record has a slot for good and is read once.
        spare_bytes: memory that the system could use as page cache once the slots are there.
    """
    total = sum(store.record_bytes(number) for number in range(store.count))
    if total < WORTH_MEASURING or (not stays and total <= spare_bytes):
        return
    if not store.read_direct():
        return
    if _buffered_is_faster(store):
        store.read_buffered()


def free_memory() -> int:
    """Bytes that the system could still give, to this process or to the page cache of its files."""
    free = psutil.virtual_memory().available
    group = cgroup_memory()
    return free if group is None else min(free, group.available)


def _buffered_is_faster(store: RecordStore) -> bool:
    """Whether buffered reads are clearly faster, or the only way that works.

    Different records are read each way, spread over the files, taking turns. The sums over all of
    them are compared, so a file of which the page cache holds a part counts as what it is.
    """
    count = min(2 * PAIRS, store.count)
    numbers = [i * store.count // count for i in range(count)]
    buffer = host_buffer(max(store.record_bytes(number) for number in numbers))
    seconds = {"buffered": 0.0, "direct": 0.0}
    nbytes = {"buffered": 0, "direct": 0}
    start = time.perf_counter()
    for buffered, direct in zip(numbers[::2], numbers[1::2], strict=False):
        for number, way in ((buffered, store.read_buffered), (direct, store.read_direct)):
            way()
            mode = store.mode
            before = time.perf_counter()
            store.read_into(number, buffer[: store.record_bytes(number)])
            seconds[mode] += time.perf_counter() - before
            nbytes[mode] += store.record_bytes(number)
            if store.mode != mode:
                return True  # the file system opens files for direct reads and then refuses them
        if time.perf_counter() - start > MOST_SECONDS:
            break
    speed = {mode: nbytes[mode] / max(seconds[mode], 1e-9) for mode in nbytes}
    return speed["buffered"] > CLEARLY * speed["direct"]
