"""Which prototype gets which cache slot: arithmetic on ints, no torch, no files, no memory.

A ``SlotCache`` gives out the slots of one record layout. A layer's forward opens a ``Pass`` over the prototypes that it
needs, in the order of their computation, and then, prototype by prototype: asks for the ``loads`` that may start now,
computes, and says ``finish``. Where a prototype lies, and whether its record has come, stands in the ``AddressTable``;
``Residency`` moves the bytes. A ``Policy`` (``eviction.py``) chooses who goes; the rules here hold for each policy,
and each rule is tested against a brute-force model:

- What a pass still needs is *locked*: it is evicted only when its own pass cannot go on otherwise, that is, when the
  very next prototype is missing and no unpinned slot holds anything else. Then the one that is needed last goes, and
  is read again when its turn comes. So one unpinned slot is enough for any pass, and the order of computation never
  depends on the number of slots.
- A slot that was assigned in a pass is not assigned again before the pass has finished with it, and one that a prefetch
  reads into not before the read is over: reads that are under way are never overwritten.
- Pinned prototypes stay. At least one slot is never pinned unless every prototype has a slot.
- A *scan* (the pass of a chunk of a prompt, which asks for almost everything once) does not count as use, and what it
  reads goes *on trial*: into at most ``ring`` slots, which are the first to be given away again. What was resident
  stays from chunk to chunk, so of P prototypes that are scanned over and over with S slots, at least S - ring are
  there, where least recently used would have none. The next pass that is no scan and asks for it makes a prototype on
  trial an ordinary one.
- A prefetch puts its prototypes on trial too, and never takes the last unpinned slot. So does what is read for the
  scan that comes next (``read_on``); that scan counts it as read for itself.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from conmoe_edge.offload.residency.address_table import AddressTable
from conmoe_edge.offload.residency.eviction import Lru, Policy
from conmoe_edge.offload.storage.place import Place

_SMALL_RING, _LARGE_RING, _WIDE_RING = 2, 8, 32
"""Slots on trial: two at least, up to eight where that is an eighth of the slots, more where it is a sixteenth. Each is
a record that every chunk reads again, and one that is read while the layer before computes, in every layer."""


@dataclass(frozen=True, slots=True)
class Load:
    """Read prototype ``item`` into its place."""

    item: int
    place: Place


@dataclass(slots=True)
class CacheCounts:
    """What passes asked for: ``hits`` had a slot when their turn came, ``misses`` had to be read; ``prefetched`` were
    read ahead of any pass, ``useful`` of them were asked for while they were there.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    useful: int = 0


def pin_order(weights: Sequence[float], slots: int, share: float = 0.5) -> tuple[int, ...]:
    """Which items to pin: those that carry the most routing weight, ties to the lowest number.

    Args:
        weights: routing weight of every item over the calibration.
        slots: how many slots there are.
        share: largest share of the slots that pins may take where not every item has a slot.

    Returns:
        All items where they all fit; else at most ``share * slots`` of them and never the last
        slot.
    """
    if slots >= len(weights):
        return tuple(range(len(weights)))
    count = max(0, min(int(slots * share), slots - 1))
    return tuple(sorted(range(len(weights)), key=lambda item: (-weights[item], item))[:count])


def ring_size(slots: int, pins: int) -> int:
    """How many slots are on trial at the most."""
    wanted = max(_SMALL_RING, min(_LARGE_RING, slots // 8), min(_WIDE_RING, slots // 16))
    return max(1, min(slots - pins, wanted))


class SlotCache:
    """``slots`` cache slots of one layout, some of them pinned, the others under a policy. One pass at a time."""

    def __init__(
        self,
        slots: int,
        pins: Sequence[int] = (),
        policy: Policy | None = None,
        table: AddressTable | None = None,
        layout: int = 0,
    ) -> None:
        """``table`` says where the prototypes of every layout lie; one of its own by default."""
        if not len(set(pins)) == len(pins) <= slots or slots < 1:
            raise ValueError("a cache has a slot, and its pins are distinct and have one each")
        self.slots = slots
        self.pinned = frozenset(pins)
        self.ring = ring_size(slots, len(pins))
        self.counts = CacheCounts()
        self.table = AddressTable() if table is None else table
        self.table.pin(pins)
        self._layout = layout
        self._policy: Policy = Lru() if policy is None else policy
        self._trial: dict[int, None] = {}  # items on trial, the oldest first
        self._ahead: set[int] = set()  # items of a prefetch that have not been asked for yet
        self._coming: set[int] = set()  # items read for a scan that has not asked for them yet
        self._free = list(range(slots - 1, -1, -1))  # taken from the end, lowest number first
        self._running: Pass | None = None

    def slot_of(self, item: int) -> int | None:
        """The slot that holds (or is being filled with) the item."""
        place = self.table.place(item)
        return None if place is None else place[1]

    @property
    def arriving(self) -> frozenset[int]:
        """The items that are still being read, not for the running pass."""
        return frozenset(self.table.arriving & (self._ahead | self._coming))

    @property
    def resident(self) -> frozenset[int]:
        """The items that have a slot."""
        return self.table.placed(self._layout)

    def fill(self, items: Sequence[int]) -> list[Load]:
        """Before the first pass: give slots to the pins and then to ``items`` in order, while there are free ones. The
        first of them are the last to go.
        """
        self._between_passes()
        loads = []
        for item in [*sorted(self.pinned), *items]:
            if self.table.place(item) is None and self._free:
                loads.append(self._load(item, self._free.pop()))
        for load in reversed(loads):
            if load.item not in self.pinned:
                self._policy.enter(load.item)
        return loads

    def lend(self, slots: int) -> None:
        """Before anything is filled: ``slots`` more of them, above the others, that ``shrink`` takes away again. They
        are the last to be filled, so no pin is among them.
        """
        if self.resident:
            raise RuntimeError("slots are lent before the first is filled")
        self._free[:0] = range(self.slots + slots - 1, self.slots - 1, -1)
        self.slots += slots

    def shrink(self, slots: int) -> None:
        """Between passes, with no read under way: forget all slots from number ``slots`` on."""
        self._between_passes()
        for item in sorted(self.resident):
            if (self.slot_of(item) or 0) >= slots:
                if item in self.pinned:
                    raise RuntimeError(f"the slot of prototype {item} stays")
                self._drop(item)
        self._free = [slot for slot in self._free if slot < slots]
        self.slots = slots

    def begin(self, order: Sequence[int], *, scan: bool = False) -> Pass:
        """Open a pass over distinct items in the order of their computation."""
        self._between_passes()
        self._running = Pass(self, order, scan)
        return self._running

    def ask(self, items: Sequence[int]) -> None:
        """A whole pass over items that are present, in this order: nothing is loaded, all are hits."""
        self._between_passes()
        for item in items:
            self._asked(item)
        self.counts.hits += len(items)

    def prefetch(self, items: Sequence[int], keep: Iterable[int] = ()) -> list[Load]:
        """Slots for items that may be asked for soon, in order, as far as some can be given up.

        ``keep`` is in use beside what a running pass needs.
        """
        loads = self._on_trial(items, keep)
        self._ahead.update(load.item for load in loads)
        self.counts.prefetched += len(loads)
        return loads

    def read_on(self, items: Sequence[int]) -> list[Load]:
        """Slots for items that the next scan will ask for, in its order, as far as some on trial are done with.

        May be called again with the same items, as more are.
        """
        loads = self._on_trial(items, ())
        self._coming.update(load.item for load in loads)
        return loads

    def taken_back(self, item: int) -> None:
        """A read that was not for a pass is not going to begin."""
        if item in self._ahead:
            self.counts.prefetched -= 1
        self.lost(item)

    def lost(self, item: int) -> None:
        """A read of the item that was not for a pass failed or was broken off: what its slot holds is not known."""
        self._free.append(self._drop(item))

    # What the pass uses.

    def _between_passes(self) -> None:
        if self._running is not None:
            raise RuntimeError("one pass at a time, and everything else between passes")

    def _load(self, item: int, slot: int) -> Load:
        place = (self._layout, slot)
        self.table.assign(item, place)
        return Load(item, place)

    def _on_trial(self, items: Sequence[int], keep: Iterable[int]) -> list[Load]:
        """Slots for items that no pass has asked for yet."""
        kept = {*items, *keep, *(() if self._running is None else self._running.needed)}
        loads = []
        room = self.slots - len(self.pinned) - 1 - len(self.arriving)
        for item in items:
            if self.table.place(item) is not None:
                continue
            slot = self._place(item, kept, on_trial=True) if len(loads) < room else None
            if slot is None:
                break
            self._trial[item] = None
            loads.append(self._load(item, slot))
        return loads

    def _reading(self, item: int) -> bool:
        """Whether the item is still being read, not for the running pass."""
        return item in self.table.arriving and (item in self._ahead or item in self._coming)

    def _evict(self, item: int, locked: Container[int]) -> int | None:
        """The slot of what the policy gives up for the item."""
        victim = self._policy.evict(item, locked)
        return None if victim is None else self.table.free(victim)[1]

    def _place(self, item: int, locked: Container[int], *, on_trial: bool) -> int | None:
        """A slot for one more item: a free one, else the least valuable one that is not locked."""
        if self._free:
            return self._free.pop()
        if on_trial and len(self._trial) < self.ring:
            slot = self._evict(item, locked)
            if slot is not None:
                return slot
        for victim in self._trial:
            if victim not in locked and not self._reading(victim):
                return self._drop(victim)
        return None if on_trial else self._evict(item, locked)

    def _force(self, item: int, needed: dict[int, None]) -> int:
        """A slot for the item whose turn it is, when ``_place`` has none: of what is on trial the one that is needed
        last, then any of the policy's, then that of the unpinned item that is needed last.
        """
        for last in reversed(needed):
            if last in self._trial and not self._reading(last):
                return self._drop(last)
        slot = self._evict(item, needed)
        if slot is not None:
            return slot
        last = next(
            other
            for other in reversed(needed)
            if self.table.place(other) is not None
            and other not in self.pinned
            and not self._reading(other)
        )
        return self._drop(last)

    def _enter(self, item: int, slot: int, *, on_trial: bool) -> Load:
        if on_trial and len(self._trial) < self.ring:
            self._trial[item] = None
        else:
            self._policy.enter(item)
        return self._load(item, slot)

    def _drop(self, item: int) -> int:
        if item in self._trial:
            del self._trial[item]
            self._ahead.discard(item)
            self._coming.discard(item)
        else:
            self._policy.leave(item)
        return self.table.free(item)[1]

    def _asked(self, item: int) -> None:
        """A pass that is no scan has used the item."""
        if item in self.pinned:
            return
        if item in self._ahead:
            self._ahead.discard(item)
            self.counts.useful += 1
        self._coming.discard(item)
        if item in self._trial:
            del self._trial[item]
            self._policy.enter(item)
        self._policy.touch((item,))

    def _close(self, unfinished: Sequence[int]) -> None:
        for item in unfinished:
            self._free.append(self._drop(item))
        self._running = None


class Pass:
    """One forward of one layer. Use as a context manager; leaving it early forgets the reads that it began.

    ``complete``: whether everything that is still needed has a slot, so that no further read will begin; known once
    ``loads`` was asked.
    """

    def __init__(self, cache: SlotCache, order: Sequence[int], scan: bool) -> None:
        self._cache = cache
        self._scan = scan
        self.needed: dict[int, None] = dict.fromkeys(order)  # in the order of their turns
        if len(self.needed) != len(order):
            raise ValueError("a pass names each item once")
        self.complete = False
        self._loaded: set[int] = set()

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *exc: object) -> None:
        # Items whose reads began here and that were never computed may hold half a record.
        self._cache._close([item for item in self._loaded if item in self.needed])

    def loads(self) -> list[Load]:
        """Reads that may start now, in the order in which they will be needed; the next item's is always among them."""
        cache, table = self._cache, self._cache.table
        begun = []
        for turn, item in enumerate(self.needed):
            if table.place(item) is not None:
                continue
            slot = cache._place(item, self.needed, on_trial=self._scan)
            if slot is None:
                if turn > 0:
                    return begun
                slot = cache._force(item, self.needed)
            self._loaded.add(item)
            begun.append(cache._enter(item, slot, on_trial=self._scan))
        self.complete = True
        return begun

    def finish(self, item: int) -> None:
        """The item, whose turn it is, has been computed; it may be evicted from now on."""
        if next(iter(self.needed)) != item:
            raise RuntimeError("items are computed in the order of the pass")
        del self.needed[item]
        cache = self._cache
        read = item in self._loaded
        if not self._scan:
            cache._asked(item)
        elif item in cache._coming:
            cache._coming.remove(item)
            read = True
        if read:
            cache.counts.misses += 1
        else:
            cache.counts.hits += 1
