"""Brings prototypes to the compute: the cache policy, the slot pools and the transfer, put
together.

``Residency.visit(numbers, compute)`` calls ``compute(position, parts)`` once for each prototype, in
the order given, whether all of them are resident or only one slot exists. The order, and with it
every sum of the caller, is the same at any budget. Reads of what comes next run while the present
one computes.

Each record layout has a pool and a policy of its own (one in almost every model). Device memory:
the pools, allocated in the constructor. Raises ``PackageError`` from reads and ``OutOfMemory``
where the pools cannot be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor

from conmoe_edge.checkpoint.manifest import PrototypeEntry
from conmoe_edge.offload.cache_policy import Load, Pass, SlotCache, pin_order
from conmoe_edge.offload.slots import SlotPool
from conmoe_edge.offload.transfer import Transfer

Compute = Callable[[int, Mapping[str, Tensor]], None]


class Residency:
    """Prototypes by number, on the device or on the way there."""

    def __init__(
        self,
        prototypes: Sequence[PrototypeEntry],
        pools: Sequence[SlotPool],
        transfer: Transfer,
    ) -> None:
        """``pools`` is indexed by layout number; a layout that no prototype uses has a pool
        without slots.
        """
        self._pool_of = [entry.layout for entry in prototypes]
        self._pools = tuple(pools)
        self._transfer = transfer
        self._ready: dict[int, Mapping[str, Tensor]] = {}  # prototypes that stay where they are
        self._resident_hits = 0
        self._record_bytes = [pools[layout].layout.nbytes for layout in self._pool_of]
        self.bytes_read = 0
        self._caches: list[SlotCache | None] = []
        for layout, pool in enumerate(self._pools):
            members = [number for number, of in enumerate(self._pool_of) if of == layout]
            if not members:
                self._caches.append(None)
                continue
            weights = [prototypes[number].weight for number in members]
            pins = [members[i] for i in pin_order(weights, pool.slots)]
            self._caches.append(SlotCache(pool.slots, pins))

    def preload(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read the pins, then what else has a place, in the order of the numbers; each record is
        read once.

        ``progress(done, total)`` counts records.
        """
        loads: list[tuple[int, Load]] = []
        for layout, cache in enumerate(self._caches):
            if cache is not None:
                members = [number for number, of in enumerate(self._pool_of) if of == layout]
                loads += [(layout, load) for load in cache.fill(members)]
        loads.sort(key=lambda item: item[1].item)  # file order, near enough
        self._begin(loads)
        for done, (layout, load) in enumerate(loads, start=1):
            self._transfer.wait((layout, load.slot))
            if progress is not None:
                progress(done, len(loads))
        self._transfer.drain()  # whatever stream computes later: the pins are there
        for layout, cache in enumerate(self._caches):
            if cache is None:
                continue
            for number in sorted(cache.pinned):
                slot = cache.slot_of(number)
                assert slot is not None, "a pin has a slot"
                self._ready[number] = self._pools[layout].parts(slot)

    @property
    def all_resident(self) -> bool:
        """True where every prototype has a slot for good."""
        return len(self._ready) == len(self._pool_of)

    @property
    def resident_count(self) -> int:
        """How many prototypes the slots hold at once, at most."""
        return sum(min(pool.slots, self._pool_of.count(i)) for i, pool in enumerate(self._pools))

    @property
    def nbytes(self) -> int:
        """Device memory of the pools."""
        return sum(pool.nbytes for pool in self._pools)

    @property
    def slots(self) -> int:
        """Slots over all pools."""
        return sum(pool.slots for pool in self._pools)

    def visit(self, numbers: Sequence[int], compute: Compute) -> None:
        """``compute(position, parts)`` for every prototype of ``numbers`` (distinct), in that
        order.

        ``parts`` are views of a slot; they are valid during the call only.
        """
        ready = self._ready
        if all(number in ready for number in numbers):
            for position, number in enumerate(numbers):
                compute(position, ready[number])
            self._resident_hits += len(numbers)
            return
        try:
            self._visit_cached(numbers, compute)
        except BaseException:
            # No read may still be writing into a slot that the policy gives away.
            self._transfer.drain()
            raise

    def _visit_cached(self, numbers: Sequence[int], compute: Compute) -> None:
        passes: list[Pass | None] = [None] * len(self._pools)
        with ExitStack() as stack:
            for layout, cache in enumerate(self._caches):
                wanted = [number for number in numbers if self._pool_of[number] == layout]
                if cache is not None and wanted:
                    passes[layout] = stack.enter_context(cache.begin(wanted))
            running = [(layout, one) for layout, one in enumerate(passes) if one is not None]
            for position, number in enumerate(numbers):
                self._begin((layout, load) for layout, one in running for load in one.loads())
                layout = self._pool_of[number]
                one = passes[layout]
                assert one is not None, "every prototype belongs to a pass"
                slot = one.slot(number)
                self._transfer.wait((layout, slot))
                compute(position, self._pools[layout].parts(slot))
                self._transfer.used((layout, slot))
                one.finish(number)

    def _begin(self, loads: Iterable[tuple[int, Load]]) -> None:
        for layout, load in loads:
            self.bytes_read += self._record_bytes[load.item]
            self._transfer.load(
                load.item, (layout, load.slot), self._pools[layout].record(load.slot)
            )

    @property
    def hits(self) -> int:
        """Prototypes that were there when a layer asked for them."""
        return self._resident_hits + sum(cache.counts.hits for cache in self._caches if cache)

    @property
    def misses(self) -> int:
        """Prototypes that had to be read first."""
        return sum(cache.counts.misses for cache in self._caches if cache)

    def reset_counts(self) -> None:
        """Hits, misses and bytes read start at zero again."""
        self._resident_hits = self.bytes_read = 0
        for cache in self._caches:
            if cache is not None:
                cache.counts.hits = cache.counts.misses = 0

    def close(self) -> None:
        """Let the device memory go. The transfer belongs to the caller."""
        self._transfer.drain()
        self._ready = {}
        for pool in self._pools:
            pool.close()
