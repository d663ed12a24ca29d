"""Brings prototypes to the compute: the cache policy, the slot pools and the transfer, put together.

``Residency.visit(numbers, compute)`` calls ``compute(positions, experts)`` until it has given each prototype once,
whether all of them are resident or only one slot exists. Reads of what is missing start before anything computes and
run on while what is there computes.

- A decode (``scan=False``) computes what is there first, all together, then what was missing in the order of its reads,
  each together with those behind it that have come by then. So the order and the company depend on what is resident:
  the caller keeps the outputs by position and adds them in a fixed order.
- A scan (a chunk of a prompt) computes in the order of ``numbers`` at any budget, one by one where something may have
  to be read, and leaves what decode uses where it is. As its own reads come to an end, those of the next layer's scan
  begin, and go on while it computes and whatever stands between the two layers.

``resident`` is the short way where nothing has to move. Shorter is a view of ``table``: there an operator sees by
itself what is there, and ``asked`` says afterwards what it used. ``prefetch`` reads ahead while no demand read is
pending. Each record layout has a pool and a policy of its own: one where all prototypes are alike.

Device memory: the pools, which the caller allocated. Raises ``PackageError`` from reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import CacheSettings, Manifest
from conmoe_edge.errors import ConmoeError
from conmoe_edge.offload.residency.address_table import AddressTable
from conmoe_edge.offload.residency.next_scan import NextScan
from conmoe_edge.offload.residency.policies import make_policy, pins_of, tables, warm_order
from conmoe_edge.offload.residency.prefetch import Prefetcher
from conmoe_edge.offload.residency.slot_cache import CacheCounts, Load, Pass, SlotCache
from conmoe_edge.offload.storage.place import Place
from conmoe_edge.offload.storage.slot_pool import SlotPool
from conmoe_edge.offload.storage.stored_expert import StoredExpert
from conmoe_edge.offload.storage.transfer import Transfer

Compute = Callable[[Sequence[int], Sequence[StoredExpert]], None]


class _Staying:
    """A view of the table: the pinned prototypes that are present, as compute takes them."""

    def __init__(self, pools: Sequence[SlotPool], pinned: frozenset[int], count: int) -> None:
        self.experts: list[StoredExpert | None] = [None] * count
        self._pools, self._pinned = pools, pinned

    def put(self, number: int, place: Place) -> None:
        if number in self._pinned:
            self.experts[number] = self._pools[place[0]].parts(place[1])

    def remove(self, number: int) -> None:
        self.experts[number] = None


class Residency:
    """Prototypes by number, on the device or on the way there.

    Attributes:
        table: where they lie.
        pools: the cache slots, by layout.
        settings: of the caches, by layout.
        layout_of: the layout of every prototype.
        bytes_read: bytes of records whose reads were begun.
        most_ahead: prototypes that a prefetch reads; ``None`` for no limit.
        prefetcher: predicts what to read ahead; ``None`` where nothing is.
        all_resident: whether every prototype is pinned, once the records are there.
    """

    def __init__(
        self,
        manifest: Manifest,
        pools: Sequence[SlotPool],
        transfer: Transfer,
        settings: Sequence[CacheSettings],
    ) -> None:
        """``pools`` and ``settings`` are indexed by layout number; a layout that no prototype uses has a pool without
        slots.

        Raises:
            ValueError: settings for more slots than a pool has.
        """
        self.table = AddressTable()
        self.pools, self.settings = tuple(pools), tuple(settings)
        self.bytes_read = 0
        self.most_ahead: int | None = None
        self.prefetcher: Prefetcher | None = None
        self.layout_of = [entry.layout for entry in manifest.prototypes]
        self._transfer = transfer
        self._resident_hits = 0
        self._demand: set[Place] = set()  # what a running visit waits for
        self._wanted: list[int] = []  # a prefetch that waits for the demand reads
        self._next_scan = NextScan(manifest)
        self._reading_on: set[int] = set()  # for the next scan, and not noticed yet
        # Compute that has returned is over on a CPU only; elsewhere a slot may be given away while it is read.
        self._direct = all(pool.device.type == "cpu" for pool in self.pools)
        self._caches: dict[int, SlotCache] = {}  # by layout, where a prototype has it
        self._warm: dict[int, tuple[int, ...]] = {}
        for layout, one in enumerate(tables(manifest)):
            pool, mine = self.pools[layout], self.settings[layout]
            if mine.slots > pool.slots:
                raise ValueError(f"{mine.slots} cache slots, and a pool of {pool.slots}")
            if one.members:
                policy, self._warm[layout] = make_policy(mine, one), warm_order(mine, one)
                cache = SlotCache(mine.slots, pins_of(mine, one), policy, self.table, layout)
                cache.lend(pool.slots - mine.slots)
                self._caches[layout] = cache
        staying = _Staying(self.pools, self.table.pinned, self.count)
        self._staying_experts = staying.experts
        self.table.watch(staying)
        self.all_resident = not self.layout_of

    def preload(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read the pins, then the heaviest of what else has a place; each record is read once.

        ``progress(done, total)`` counts records.
        """
        loads = [
            load
            for layout, cache in self._caches.items()
            for load in cache.fill(self._warm[layout])
        ]
        loads.sort(key=lambda load: load.item)  # file order, near enough
        self._begin(loads)
        for done, load in enumerate(loads, start=1):
            self._transfer.wait(load.place)
            if progress is not None:
                progress(done, len(loads))
        self._transfer.drain()  # whatever stream computes later: the records are there
        for load in loads:
            self.table.arrived(load.item)
        self.all_resident = self.table.stay(range(len(self.layout_of)))

    def kinds(self, numbers: Iterable[int]) -> list[StoredExpert]:
        """One stored expert of each layout that ``numbers`` have, whatever it holds now: for its forms."""
        return [
            self.pools[layout].parts(0) for layout in sorted({self.layout_of[n] for n in numbers})
        ]

    def used(self, count: int) -> None:
        """So many prototypes that stay (``AddressTable.stay``) were computed with."""
        self._resident_hits += count

    def asked(self, numbers: Sequence[int]) -> None:
        """These prototypes, which are there, were computed with for one token."""
        for layout, mine in self._shares(numbers):
            self._caches[layout].ask(mine)

    @property
    def count(self) -> int:
        """How many prototypes there are."""
        return len(self.layout_of)

    @property
    def resident_count(self) -> int:
        """How many prototypes the slots hold at once, at most."""
        return sum(min(pool.slots, self.layout_of.count(i)) for i, pool in enumerate(self.pools))

    @property
    def nbytes(self) -> int:
        """Device memory of the pools."""
        return sum(pool.nbytes for pool in self.pools)

    @property
    def slots(self) -> int:
        """Slots over all pools."""
        return sum(pool.slots for pool in self.pools)

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
        if not self.table.present(numbers):
            return None
        self.asked(numbers)
        return [self._stored(self._place(number)) for number in numbers]

    def visit(
        self,
        numbers: Sequence[int],
        compute: Compute,
        *,
        scan: bool = False,
        ahead: Sequence[int] = (),
    ) -> None:
        """``compute(positions, experts)`` until every prototype of ``numbers`` (distinct) has had its turn: a scan in
        that order, one by one unless all of them stay, a decode first what is there, then the others as they come.

        ``experts`` are valid during the call only. ``ahead`` is prefetched when no read for ``numbers`` is pending;
        with a scan it is what the next scan will probably ask for, in its order, and as much of it is read as there are
        slots on trial that this one is done with.
        """
        staying = self._staying(numbers)
        if staying is not None:
            if ahead:
                self._read_on(ahead) if scan else self.prefetch(ahead)
            compute(list(range(len(staying))), staying)
            return
        self._wanted = [] if scan else list(ahead)  # what was wanted before was for this visit
        try:
            self.collect(numbers if scan else ())
            self._visit_cached(numbers, compute, scan, ahead if scan else ())
        except BaseException:
            # No read may still be writing into a slot that the policy gives away.
            self._transfer.drain()
            self._demand.clear()
            self._wanted = []
            self._lose_prefetches()
            raise

    def likely_next(self, layer: int, hidden: Tensor) -> Sequence[int]:
        """What the MoE layer after ``layer`` will probably ask for, where it is read ahead; ``hidden`` is [1, H], what
        the experts of ``layer`` get.
        """
        return () if self.prefetcher is None else self.prefetcher.next(layer, hidden)

    def scanned_next(self, layer: int, asked: int) -> Sequence[int]:
        """What the MoE layer after ``layer`` will be asked for by a chunk of a prompt that asks ``layer`` for so many
        prototypes; empty where that cannot be said.
        """
        return self._next_scan.after(layer, asked)

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

    def collect(self, scanned: Sequence[int] = ()) -> None:
        """Notice reads ahead that are over, and take back those that have not begun: a demand read is quicker. Those
        for a scan are demand reads, and go on if they are among what is ``scanned``.

        One that failed is forgotten: a visit that asks for it reads it again, and reports the error.
        """
        going_on = self._reading_on.intersection(scanned)
        self._reading_on.clear()
        for number in sorted(self.table.arriving):
            place, cache = self._place(number), self._caches[self.layout_of[number]]
            if not self._transfer.ready(place):
                if number in going_on:
                    continue
                if self._transfer.cancel(number, place, self._record(place)):
                    self.bytes_read -= self.pools[place[0]].layout.nbytes
                    cache.taken_back(number)
                continue
            try:
                self._transfer.wait(place)
            except ConmoeError:
                cache.lost(number)
            else:
                self.table.arrived(number)

    def _staying(self, numbers: Sequence[int]) -> list[StoredExpert] | None:
        """These prototypes, where all of them stay; it counts as use."""
        found, experts = [], self._staying_experts
        for number in numbers:
            expert = experts[number]
            if expert is None:
                return None
            found.append(expert)
        self.used(len(found))
        return found

    def _lose_prefetches(self) -> None:
        """After the transfer was drained: whether a read went well is not known any more."""
        self._reading_on.clear()
        for number in sorted(self.table.arriving):
            self._caches[self.layout_of[number]].lost(number)

    def _shares(self, numbers: Sequence[int]) -> list[tuple[int, list[int]]]:
        """(layout, those of ``numbers`` that have it, in their order), for the layouts that occur."""
        if len(self._caches) == 1:
            return [(layout, list(numbers)) for layout in self._caches]
        mine: dict[int, list[int]] = {}
        for number in numbers:
            mine.setdefault(self.layout_of[number], []).append(number)
        return sorted(mine.items())

    def _turns(self, numbers: Sequence[int]) -> list[int]:
        """Positions in the order of a decode: what is there, what a prefetch is bringing, what is missing."""
        there: list[int] = []
        coming: list[int] = []
        missing: list[int] = []
        place, arriving = self.table.place, self.table.arriving
        for position, number in enumerate(numbers):
            if place(number) is None:
                missing.append(position)
            else:
                (coming if number in arriving else there).append(position)
        return [*there, *coming, *missing]

    def _visit_cached(
        self, numbers: Sequence[int], compute: Compute, scan: bool, after: Sequence[int]
    ) -> None:
        left = list(range(len(numbers))) if scan else self._turns(numbers)
        with ExitStack() as stack:
            passes: dict[int, Pass] = {}
            for layout, mine in self._shares([numbers[position] for position in left]):
                passes[layout] = stack.enter_context(self._caches[layout].begin(mine, scan=scan))
            while left:
                for one in passes.values():
                    if not one.complete:
                        self._begin(one.loads(), demand=True)
                places = [self._place(numbers[left[0]])]
                if not scan:
                    places += self._ready_after(numbers, left)
                turn, left = left[: len(places)], left[len(places) :]
                for position, place in zip(turn, places, strict=True):
                    self._transfer.wait(place)
                    self._demand.discard(place)
                    self.table.arrived(numbers[position])
                if (self._wanted or after) and all(one.complete for one in passes.values()):
                    self._start_prefetch()
                    self._read_on(after)
                compute(turn, [self._stored(place) for place in places])
                for position, place in zip(turn, places, strict=True):
                    self._transfer.used(place)
                    passes[place[0]].finish(numbers[position])
        self._read_on(after)

    def _place(self, number: int) -> Place:
        """The place of a prototype that has one, whatever is in it."""
        place = self.table.place(number)
        if place is None:
            raise RuntimeError(f"prototype {number} has no cache slot")
        return place

    def _record(self, place: Place) -> Tensor:
        """The bytes of a cache slot."""
        return self.pools[place[0]].record(place[1])

    def _stored(self, place: Place) -> StoredExpert:
        """What is in a cache slot, as compute takes it."""
        return self.pools[place[0]].parts(place[1])

    def _ready_after(self, numbers: Sequence[int], left: Sequence[int]) -> list[Place]:
        """The places of those behind the first of ``left`` that need not be waited for, as far as they follow it."""
        places = []
        for position in left[1:]:
            place = self.table.place(numbers[position])
            if place is None or not self._transfer.ready(place):
                break
            places.append(place)
        return places

    def _start_prefetch(self, keep: Sequence[int] = ()) -> None:
        if self._demand:
            return
        wanted = [number for number in self._wanted if self.table.place(number) is None]
        self._wanted = []
        for layout, mine in self._shares(wanted[: self.most_ahead]):
            self._begin(self._caches[layout].prefetch(mine, keep), ahead=True)

    def _read_on(self, after: Sequence[int]) -> None:
        """For the next scan, into the slots on trial that are done with."""
        for layout, mine in self._shares(after):
            loads = self._caches[layout].read_on(mine)
            self._reading_on.update(load.item for load in loads)
            self._begin(loads)

    def _begin(self, loads: Iterable[Load], *, demand: bool = False, ahead: bool = False) -> None:
        for load in loads:
            self.bytes_read += self.pools[load.place[0]].layout.nbytes
            if demand:
                self._demand.add(load.place)
            self._transfer.load(load.item, load.place, self._record(load.place), ahead=ahead)

    @property
    def hits(self) -> int:
        """Prototypes that were there when a layer asked for them."""
        return self._resident_hits + sum(one.counts.hits for one in self._caches.values())

    @property
    def misses(self) -> int:
        """Prototypes that had to be read first."""
        return sum(one.counts.misses for one in self._caches.values())

    @property
    def prefetched(self) -> tuple[int, int]:
        """(prototypes read ahead, how many of them were asked for while they were there)."""
        counts = [one.counts for one in self._caches.values()]
        return sum(one.prefetched for one in counts), sum(one.useful for one in counts)

    def shrink(self, slots: Sequence[int]) -> None:
        """Between visits: give back every pool's slots from number ``slots[layout]`` on. Pins stay."""
        self._transfer.drain()
        self._wanted = []
        self._lose_prefetches()
        for layout, cache in self._caches.items():
            if slots[layout] < self.pools[layout].slots:
                cache.shrink(slots[layout])
                self.pools[layout].shrink(slots[layout])

    def reset_counts(self) -> None:
        """Hits, misses, prefetches and bytes read start at zero again."""
        self._resident_hits = self.bytes_read = 0
        for cache in self._caches.values():
            cache.counts = CacheCounts()

    def close(self) -> None:
        """Let the device memory go; nothing can be visited afterwards. The transfer belongs to the caller."""
        self._transfer.drain()
        self.prefetcher = None
        self.table.clear()
        for pool in self.pools:
            pool.close()
