"""Brings prototypes to the compute: the cache policy, the slot pools and the transfer, put
together.

``Residency.visit(numbers, compute)`` calls ``compute(position, expert)`` once for each prototype,
whether all of them are resident or only one slot exists. Reads of what is missing start before
anything computes and run on while the present prototype computes.

- A decode (``scan=False``) computes what is there first, then what was missing in the order of its
  reads. So the order depends on what is resident: the caller keeps the outputs by position and adds
  them in a fixed order.
- A scan (a chunk of a prompt) computes in the order of ``numbers`` at any budget, and leaves what
  decode uses where it is.

``resident`` is the short way where nothing has to move; ``prefetch`` reads ahead while no demand
read is pending. Each record layout has a pool and a policy of its own: one where all prototypes are alike.
Device memory: the pools, which the caller allocated. Raises ``PackageError`` from reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from conmoe_edge.checkpoint.manifest import CacheSettings, Manifest
from conmoe_edge.errors import ConmoeError
from conmoe_edge.offload.cache_policy import CacheCounts, Load, Pass, SlotCache
from conmoe_edge.offload.replay import make_policy, pins_of, tables, warm_order
from conmoe_edge.offload.slots import SlotPool
from conmoe_edge.offload.stored_expert import StoredExpert
from conmoe_edge.offload.transfer import Transfer

Compute = Callable[[int, StoredExpert], None]


class Residency:
    """Prototypes by number, on the device or on the way there."""

    def __init__(
        self,
        manifest: Manifest,
        pools: Sequence[SlotPool],
        transfer: Transfer,
        settings: Sequence[CacheSettings],
    ) -> None:
        """``pools`` and ``settings`` are indexed by layout number; a layout that no prototype uses
        has a pool without slots.
        """
        self._pool_of = [entry.layout for entry in manifest.prototypes]
        self._pools = tuple(pools)
        self._transfer = transfer
        self.settings = tuple(settings)
        self._ready: list[StoredExpert | None] = [None] * len(self._pool_of)
        self._resident_hits = 0
        self._record_bytes = [pools[layout].layout.nbytes for layout in self._pool_of]
        self.bytes_read = 0
        self._demand: set[tuple[int, int]] = set()  # slots that a running visit waits for
        self._wanted: list[int] = []  # a prefetch that waits for the demand reads
        self.most_ahead: int | None = None  # prototypes that a prefetch reads; no limit
        # Compute that has returned is over on a CPU only; elsewhere a slot may be given away while it is read.
        self._direct = all(pool.device.type == "cpu" for pool in self._pools)
        self._caches: list[SlotCache | None] = []
        self._warm: list[tuple[int, ...]] = []
        for pool, one, table in zip(self._pools, self.settings, tables(manifest), strict=True):
            assert one.slots <= pool.slots, "the settings are for these pools"
            self._warm.append(warm_order(one, table))
            self._caches.append(
                SlotCache(one.slots, pins_of(one, table), make_policy(one, table))
                if table.members
                else None
            )
            cache = self._caches[-1]
            if cache is not None:
                cache.lend(pool.slots - one.slots)
        self.all_resident = not self._pool_of  # once the records are there

    def preload(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read the pins, then the heaviest of what else has a place; each record is read once.

        ``progress(done, total)`` counts records.
        """
        loads: list[tuple[int, Load]] = []
        for layout, cache in enumerate(self._caches):
            if cache is not None:
                loads += [(layout, load) for load in cache.fill(self._warm[layout])]
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
        self.all_resident = all(expert is not None for expert in self._ready)

    def pinned(self, numbers: Sequence[int]) -> list[StoredExpert] | None:
        """These prototypes, where all of them stay for as long as this object is in use."""
        ready = self._ready
        found = []
        for number in numbers:
            expert = ready[number]
            if expert is None:
                return None
            found.append(expert)
        return found

    def used(self, count: int) -> None:
        """So many pinned prototypes were asked for."""
        self._resident_hits += count

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

    def resident(self, numbers: Sequence[int]) -> list[StoredExpert] | None:
        """The prototypes of ``numbers`` where none of them has to be read; else ``None``, and ``visit`` is the way.

        They are valid until the next call of any method, but for a ``prefetch`` that keeps them. For decode: it
        counts as use. Without bookkeeping where all of them stay for good; on a CPU also where they happen to be
        there.
        """
        found = self._staying(numbers)
        if found is not None or not self._direct:
            return found
        self._collect()
        shares = self._shares(numbers)
        if any(not cache.has(mine) for _, cache, mine in shares):
            return None
        for _, cache, mine in shares:
            cache.ask(mine)
        found = []
        for number in numbers:
            cache = self._caches[self._pool_of[number]]
            slot = None if cache is None else cache.slot_of(number)
            assert slot is not None, "it has a slot, or ``has`` is wrong"
            found.append(self._pools[self._pool_of[number]].parts(slot))
        return found

    def visit(
        self,
        numbers: Sequence[int],
        compute: Compute,
        *,
        scan: bool = False,
        ahead: Sequence[int] = (),
    ) -> None:
        """``compute(position, expert)`` for every prototype of ``numbers`` (distinct): a scan in that order, a
        decode first what is there.

        ``expert`` is valid during the call only. ``ahead`` is prefetched as soon as no read for ``numbers`` is pending.
        """
        staying = self._staying(numbers)
        if staying is not None:
            if ahead:
                self.prefetch(ahead)
            for position, expert in enumerate(staying):
                compute(position, expert)
            return
        self._wanted = list(ahead)  # what was wanted before was for this visit
        try:
            self._collect()
            self._visit_cached(numbers, compute, scan)
        except BaseException:
            # No read may still be writing into a slot that the policy gives away.
            self._transfer.drain()
            self._demand.clear()
            self._wanted = []
            for cache in self._caches:
                for item in sorted(cache.arriving) if cache is not None else ():
                    cache.lost(item)  # type: ignore[union-attr]
            raise

    def prefetch(self, numbers: Sequence[int], keep: Sequence[int] = ()) -> None:
        """Read what will probably be asked for next, the likeliest first, as far as slots can be given up for it.

        Reads at most ``most_ahead`` of those that are not there. Starts when no demand read is pending, now or in the
        course of the running visit; a later call or the next visit takes the place of what has not begun. What
        ``keep`` names is in use and stays.
        """
        self._wanted = list(numbers)
        if not self._demand:
            self._collect()
            self._start_prefetch(keep)

    def _staying(self, numbers: Sequence[int]) -> list[StoredExpert] | None:
        found = self.pinned(numbers)
        if found is not None:
            self.used(len(found))
        return found

    def _shares(self, numbers: Sequence[int]) -> list[tuple[int, SlotCache, list[int]]]:
        """(layout, its cache, what it has to give of ``numbers``), for the caches that have a share."""
        if len(self._caches) == 1 and self._caches[0] is not None:
            return [(0, self._caches[0], list(numbers))]
        shares = []
        for layout, cache in enumerate(self._caches):
            mine = [number for number in numbers if self._pool_of[number] == layout]
            if cache is not None and mine:
                shares.append((layout, cache, mine))
        return shares

    def _turns(self, numbers: Sequence[int]) -> list[int]:
        """Positions in the order of a decode: what is there, what a prefetch is bringing, what is missing."""

        def rank(position: int) -> int:
            number = numbers[position]
            cache = self._caches[self._pool_of[number]]
            assert cache is not None, "every prototype has a cache"
            if cache.slot_of(number) is None:
                return 2
            return 1 if number in cache.arriving else 0

        return sorted(range(len(numbers)), key=rank)

    def _visit_cached(self, numbers: Sequence[int], compute: Compute, scan: bool) -> None:
        turns = list(range(len(numbers))) if scan else self._turns(numbers)
        with ExitStack() as stack:
            passes: dict[int, Pass] = {}
            for layout, cache, mine in self._shares([numbers[position] for position in turns]):
                passes[layout] = stack.enter_context(cache.begin(mine, scan=scan))
            for position in turns:
                for layout, one in passes.items():
                    self._begin([(layout, load) for load in one.loads()], demand=True)
                number = numbers[position]
                layout = self._pool_of[number]
                place = (layout, passes[layout].slot(number))
                self._transfer.wait(place)
                self._demand.discard(place)
                cache = self._caches[layout]
                assert cache is not None, "a pass has a cache"
                cache.arrived(number)
                if self._wanted and all(one.complete for one in passes.values()):
                    self._start_prefetch()
                compute(position, self._pools[layout].parts(place[1]))
                self._transfer.used(place)
                passes[layout].finish(number)

    def _start_prefetch(self, keep: Sequence[int] = ()) -> None:
        if self._demand:
            return
        wanted = [number for number in self._wanted if not self._has_slot(number)]
        self._wanted = []
        for layout, cache, mine in self._shares(wanted[: self.most_ahead]):
            loads = [(layout, load) for load in cache.prefetch(mine, keep)]
            self._begin(loads, ahead=True)

    def _has_slot(self, number: int) -> bool:
        cache = self._caches[self._pool_of[number]]
        return cache is not None and cache.slot_of(number) is not None

    def _collect(self) -> None:
        """Notice prefetches that are over, and take back those that have not begun: a demand read is quicker.

        One that failed is forgotten: whoever asks for it will be told.
        """
        for layout, cache in enumerate(self._caches):
            for number in sorted(cache.arriving) if cache is not None else ():
                assert cache is not None
                slot = cache.slot_of(number)
                assert slot is not None, "what is arriving has a slot"
                place = (layout, slot)
                if not self._transfer.ready(place):
                    if self._transfer.cancel(number, place, self._pools[layout].record(slot)):
                        self.bytes_read -= self._record_bytes[number]
                        cache.counts.prefetched -= 1
                        cache.lost(number)
                    continue
                try:
                    self._transfer.wait(place)
                except ConmoeError:
                    cache.lost(number)
                else:
                    cache.arrived(number)

    def _begin(
        self, loads: Iterable[tuple[int, Load]], *, demand: bool = False, ahead: bool = False
    ) -> None:
        for layout, load in loads:
            self.bytes_read += self._record_bytes[load.item]
            place = (layout, load.slot)
            if demand:
                self._demand.add(place)
            target = self._pools[layout].record(load.slot)
            self._transfer.load(load.item, place, target, ahead=ahead)

    @property
    def hits(self) -> int:
        """Prototypes that were there when a layer asked for them."""
        return self._resident_hits + sum(cache.counts.hits for cache in self._caches if cache)

    @property
    def misses(self) -> int:
        """Prototypes that had to be read first."""
        return sum(cache.counts.misses for cache in self._caches if cache)

    @property
    def prefetched(self) -> tuple[int, int]:
        """(prototypes read ahead, how many of them were asked for while they were there)."""
        counts = [cache.counts for cache in self._caches if cache]
        return sum(one.prefetched for one in counts), sum(one.useful for one in counts)

    def shrink(self, slots: Sequence[int]) -> None:
        """Between visits: give back every pool's slots from number ``slots[layout]`` on. Pins stay."""
        self._transfer.drain()
        self._wanted = []
        for cache, pool, count in zip(self._caches, self._pools, slots, strict=True):
            if cache is not None and count < pool.slots:
                for item in sorted(cache.arriving):
                    cache.lost(item)  # drained: whether its read went well is not known
                cache.shrink(count)
                pool.shrink(count)

    def reset_counts(self) -> None:
        """Hits, misses, prefetches and bytes read start at zero again."""
        self._resident_hits = self.bytes_read = 0
        for cache in self._caches:
            if cache is not None:
                cache.counts = CacheCounts()

    def close(self) -> None:
        """Let the device memory go. The transfer belongs to the caller."""
        self._transfer.drain()
        self._ready = []
        for pool in self._pools:
            pool.close()
