"""Brings prototypes to the compute: the cache policy, the slot pools and the transfer, put
together.

``Residency.visit(numbers, compute)`` calls ``compute(positions, experts)`` until it has given each
prototype once, whether all of them are resident or only one slot exists. Reads of what is missing
start before anything computes and run on while what is there computes.

- A decode (``scan=False``) computes what is there first, all together, then what was missing in the
  order of its reads, each together with those behind it that have come by then. So the order and the
  company depend on what is resident: the caller keeps the outputs by position and adds them in a
  fixed order.
- A scan (a chunk of a prompt) computes one by one in the order of ``numbers`` at any budget, and
  leaves what decode uses where it is.

``resident`` is the short way where nothing has to move. Shorter are ``addresses``: there an operator
sees by itself what is there, and ``asked`` says afterwards what it used. ``prefetch`` reads
ahead while no demand read is pending. Each record layout has a pool and a policy of its own: one
where all prototypes are alike.

Device memory: the pools, which the caller allocated. Raises ``PackageError`` from reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from conmoe_edge.checkpoint.format.manifest import CacheSettings, Manifest
from conmoe_edge.errors import ConmoeError
from conmoe_edge.offload.residency.address_table import Addresses, Presence
from conmoe_edge.offload.residency.slot_cache import CacheCounts, Load, Pass, SlotCache
from conmoe_edge.offload.simulate.policy_search import make_policy, pins_of, tables, warm_order
from conmoe_edge.offload.storage.slot_pool import SlotPool
from conmoe_edge.offload.storage.stored_expert import StoredExpert
from conmoe_edge.offload.storage.transfer import Slot, Transfer

Compute = Callable[[Sequence[int], Sequence[StoredExpert]], None]


class Residency:
    """Prototypes by number, on the device or on the way there."""

    def __init__(
        self,
        manifest: Manifest,
        pools: Sequence[SlotPool],
        transfer: Transfer,
        settings: Sequence[CacheSettings],
        addresses: Addresses | None = None,
    ) -> None:
        """``pools`` and ``settings`` are indexed by layout number; a layout that no prototype uses
        has a pool without slots. ``addresses`` is kept up to date: what is there, and where.
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
        self._presence = None if addresses is None else Presence(self._pools, addresses)
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
        for cache in filter(None, self._caches):
            for number in sorted(cache.resident):
                self._arrived(number)
            for number in sorted(cache.pinned):
                self._ready[number] = self._stored(number)
        self.all_resident = all(expert is not None for expert in self._ready)

    def kinds(self, numbers: Iterable[int]) -> list[StoredExpert]:
        """One stored expert of each layout that ``numbers`` have, whatever it holds now: for its forms."""
        return [
            self._pools[layout].parts(0) for layout in sorted({self._pool_of[n] for n in numbers})
        ]

    def stay(self, numbers: Iterable[int]) -> bool:
        """Whether all of these prototypes are there for as long as this object is in use."""
        return all(self._ready[number] is not None for number in numbers)

    def used(self, count: int) -> None:
        """So many prototypes that ``stay`` were computed with."""
        self._resident_hits += count

    def placed(self, number: int) -> bool:
        """Whether the prototype is there, or on its way."""
        return self._slot_of(number) is not None

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether these prototypes are there."""
        return all(cache.has(mine) for _, cache, mine in self._shares(numbers))

    def asked(self, numbers: Sequence[int]) -> None:
        """These prototypes, which are there, were computed with for one token."""
        for _, cache, mine in self._shares(numbers):
            cache.ask(mine)

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
        self.collect()
        if not self.has(numbers):
            return None
        self.asked(numbers)
        return [self._stored(number) for number in numbers]

    def visit(
        self,
        numbers: Sequence[int],
        compute: Compute,
        *,
        scan: bool = False,
        ahead: Sequence[int] = (),
    ) -> None:
        """``compute(positions, experts)`` until every prototype of ``numbers`` (distinct) has had its turn: a scan one
        by one in that order, a decode first what is there, then the others as they come.

        ``experts`` are valid during the call only. ``ahead`` is prefetched when no read for ``numbers`` is pending.
        """
        staying = self._staying(numbers)
        if staying is not None:
            if ahead:
                self.prefetch(ahead)
            for turn in [[n] for n in range(len(staying))] if scan else [list(range(len(staying)))]:
                compute(turn, [staying[position] for position in turn])
            return
        self._wanted = list(ahead)  # what was wanted before was for this visit
        try:
            self.collect()
            self._visit_cached(numbers, compute, scan)
        except BaseException:
            # No read may still be writing into a slot that the policy gives away.
            self._transfer.drain()
            self._demand.clear()
            self._wanted = []
            for cache in self._caches:
                for item in sorted(cache.arriving) if cache is not None else ():
                    cache.lost(item)  # type: ignore[union-attr]
            if self._presence is not None:
                self._presence.keep(self._slot_of)
            raise

    def prefetch(self, numbers: Sequence[int], keep: Sequence[int] = ()) -> None:
        """Read what will probably be asked for next, the likeliest first, as far as slots can be given up for it.

        Reads at most ``most_ahead`` of those that are not there. Starts when no demand read is pending, now or in the
        course of the running visit; a later call or the next visit takes the place of what has not begun. What
        ``keep`` names is in use and stays.
        """
        self._wanted = list(numbers)
        if not self._demand:
            self.collect()
            self._start_prefetch(keep)

    def collect(self) -> None:
        """Notice prefetches that are over, and take back those that have not begun: a demand read is quicker.

        One that failed is forgotten: whoever asks for it will be told.
        """
        for layout, cache in enumerate(self._caches):
            for number in sorted(cache.arriving) if cache is not None else ():
                assert cache is not None
                place = self._place(number)
                if not self._transfer.ready(place):
                    if self._transfer.cancel(number, place, self._pools[layout].record(place[1])):
                        self.bytes_read -= self._record_bytes[number]
                        cache.counts.prefetched -= 1
                        cache.lost(number)
                    continue
                try:
                    self._transfer.wait(place)
                except ConmoeError:
                    cache.lost(number)
                else:
                    self._arrived(number)

    def _staying(self, numbers: Sequence[int]) -> list[StoredExpert] | None:
        """These prototypes, where all of them stay; it counts as use."""
        found = []
        for number in numbers:
            expert = self._ready[number]
            if expert is None:
                return None
            found.append(expert)
        self.used(len(found))
        return found

    def _arrived(self, number: int) -> None:
        """The prototype's slot has its record: compute may read it from now on."""
        layout, slot = self._place(number)
        cache = self._caches[layout]
        assert cache is not None, "it has a slot"
        cache.arrived(number)
        if self._presence is not None:
            self._presence.arrived(number, layout, slot)

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
        left = list(range(len(numbers))) if scan else self._turns(numbers)
        with ExitStack() as stack:
            passes: dict[int, Pass] = {}
            for layout, cache, mine in self._shares([numbers[position] for position in left]):
                passes[layout] = stack.enter_context(cache.begin(mine, scan=scan))
            while left:
                for layout, one in passes.items():
                    self._begin([(layout, load) for load in one.loads()], demand=True)
                places = [self._place(numbers[left[0]])]
                if not scan:
                    places += self._ready_after(numbers, left)
                turn, left = left[: len(places)], left[len(places) :]
                for position, place in zip(turn, places, strict=True):
                    self._transfer.wait(place)
                    self._demand.discard(place)
                    self._arrived(numbers[position])
                if self._wanted and all(one.complete for one in passes.values()):
                    self._start_prefetch()
                compute(turn, [self._pools[layout].parts(slot) for layout, slot in places])
                for position, place in zip(turn, places, strict=True):
                    self._transfer.used(place)
                    passes[place[0]].finish(numbers[position])

    def _place(self, number: int) -> Slot:
        """The slot of a prototype that has one, whatever is in it."""
        slot = self._slot_of(number)
        assert slot is not None, "a pass gives the next one a slot"
        return self._pool_of[number], slot

    def _stored(self, number: int) -> StoredExpert:
        layout, slot = self._place(number)
        return self._pools[layout].parts(slot)

    def _ready_after(self, numbers: Sequence[int], left: Sequence[int]) -> list[Slot]:
        """The slots of those behind the first of ``left`` that need not be waited for, as far as they follow it."""
        places = []
        for position in left[1:]:
            slot = self._slot_of(numbers[position])
            place = (self._pool_of[numbers[position]], slot or 0)
            if slot is None or not self._transfer.ready(place):
                break
            places.append(place)
        return places

    def _start_prefetch(self, keep: Sequence[int] = ()) -> None:
        if self._demand:
            return
        wanted = [number for number in self._wanted if self._slot_of(number) is None]
        self._wanted = []
        for layout, cache, mine in self._shares(wanted[: self.most_ahead]):
            loads = [(layout, load) for load in cache.prefetch(mine, keep)]
            self._begin(loads, ahead=True)

    def _slot_of(self, number: int) -> int | None:
        cache = self._caches[self._pool_of[number]]
        return None if cache is None else cache.slot_of(number)

    def _begin(
        self, loads: Iterable[tuple[int, Load]], *, demand: bool = False, ahead: bool = False
    ) -> None:
        for layout, load in loads:
            self.bytes_read += self._record_bytes[load.item]
            place = (layout, load.slot)
            if self._presence is not None:
                self._presence.gone(*place)
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
                if self._presence is not None:
                    self._presence.keep(self._slot_of)
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
        if self._presence is not None:
            self._presence.keep(lambda number: None)
        for pool in self._pools:
            pool.close()
