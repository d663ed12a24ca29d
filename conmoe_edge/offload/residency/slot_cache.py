"""Which cache slot holds which prototype: pure arithmetic on ints, no torch, no files, no memory.

A ``SlotCache`` has ``slots`` places. A layer's forward opens a ``Pass`` over the prototypes it
needs, in the order in which it will compute them, and then, prototype by prototype: asks for the
``loads`` that may start now, computes, and says ``finish``. Somebody else moves the bytes. Who goes
is the business of a ``Policy`` (``eviction.py``); the rules here hold for each of them, and each is
tested against a brute-force model:

- What a pass still needs is *locked*: it is evicted only when its own pass cannot go on otherwise,
  that is, when the very next prototype is missing and no unpinned slot holds anything else. Then
  the one that is needed last goes, and is read again when its turn comes. So one unpinned slot is
  enough for any pass, and the order of computation never depends on the number of slots.
- A slot that was assigned in a pass is not assigned again before the pass has finished with it, and
  one that a prefetch reads into not before the read has ``arrived``: reads that are under way are
  never overwritten.
- Pinned prototypes stay. At least one slot is never pinned unless every prototype has a slot.
- A *scan* (the pass of a chunk of a prompt, which asks for almost everything once) does not count
  as use, and what it reads goes *on trial*: into at most ``ring`` slots, which are the first to be
  given away again. What was resident stays from chunk to chunk, so of P prototypes that are scanned
  over and over with S slots, at least S - ring are there, where least recently used would have
  none. The next pass that is no scan and asks for it makes a prototype on trial an ordinary one.
- A prefetch puts its prototypes on trial too, and never takes the last unpinned slot.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from conmoe_edge.offload.residency.eviction import Lru, Policy

_SMALL_RING, _LARGE_RING = 2, 8


@dataclass(frozen=True, slots=True)
class Load:
    """Read prototype ``item`` into cache slot ``slot``."""

    item: int
    slot: int


@dataclass(slots=True)
class CacheCounts:
    """What passes asked for: ``hits`` had a slot when their turn came, ``misses`` had to be read;
    ``prefetched`` were read ahead of any pass, ``useful`` of them were asked for while they were
    there.
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
    return max(1, min(slots - pins, max(_SMALL_RING, min(_LARGE_RING, slots // 8))))


class SlotCache:
    """``slots`` places, some of them pinned, the others under a policy. One pass at a time."""

    def __init__(self, slots: int, pins: Sequence[int] = (), policy: Policy | None = None) -> None:
        assert slots >= 1, "a cache needs a slot"
        assert len(set(pins)) == len(pins) <= slots, "pins are distinct and have a slot each"
        self.slots = slots
        self.pinned = frozenset(pins)
        self.ring = ring_size(slots, len(pins))
        self.counts = CacheCounts()
        self._policy: Policy = Lru() if policy is None else policy
        self._slot_of: dict[int, int] = {}
        self._trial: dict[int, None] = {}  # resident items on trial, the oldest first
        self._arriving: set[int] = set()  # items of a prefetch whose read is under way
        self._ahead: set[int] = set()  # items of a prefetch that nobody has asked for yet
        self._free = list(range(slots - 1, -1, -1))  # taken from the end, lowest number first
        self._running: Pass | None = None

    def slot_of(self, item: int) -> int | None:
        """The slot that holds (or is being filled with) the item."""
        return self._slot_of.get(item)

    @property
    def arriving(self) -> frozenset[int]:
        """The items that a prefetch is still reading."""
        return frozenset(self._arriving)

    @property
    def resident(self) -> frozenset[int]:
        """The items that have a slot."""
        return frozenset(self._slot_of)

    def fill(self, items: Sequence[int]) -> list[Load]:
        """Before the first pass: give slots to the pins and then to ``items`` in order, while
        there are free ones. The first of them are the last to go.
        """
        assert self._running is None, "filling happens between passes"
        loads = []
        for item in [*sorted(self.pinned), *items]:
            if item not in self._slot_of and self._free:
                self._slot_of[item] = self._free.pop()
                loads.append(Load(item, self._slot_of[item]))
        for load in reversed(loads):
            if load.item not in self.pinned:
                self._policy.enter(load.item)
        return loads

    def lend(self, slots: int) -> None:
        """Before anything is filled: ``slots`` more places, above the others, that ``shrink`` takes
        away again. They are the last to be filled, so no pin is among them.
        """
        assert not self._slot_of, "lending comes first"
        self._free[:0] = range(self.slots + slots - 1, self.slots - 1, -1)
        self.slots += slots

    def shrink(self, slots: int) -> None:
        """Between passes, with no read under way: forget all places from number ``slots`` on."""
        assert self._running is None, "shrinking happens between passes"
        for item in [item for item, slot in self._slot_of.items() if slot >= slots]:
            assert item not in self.pinned, "pins were placed first"
            self._drop(item)
        self._free = [slot for slot in self._free if slot < slots]
        self.slots = slots

    def begin(self, order: Sequence[int], *, scan: bool = False) -> Pass:
        """Open a pass over distinct items in the order of their computation."""
        assert self._running is None, "one pass at a time"
        self._running = Pass(self, order, scan)
        return self._running

    def has(self, items: Iterable[int]) -> bool:
        """Whether all of them have a slot and nothing is on its way there."""
        return all(item in self._slot_of and item not in self._arriving for item in items)

    def ask(self, items: Sequence[int]) -> None:
        """A whole pass over items that are there (``has``), in this order: nothing is loaded, all are hits."""
        assert self._running is None, "one pass at a time"
        for item in items:
            self._asked(item)
        self.counts.hits += len(items)

    def prefetch(self, items: Sequence[int], keep: Iterable[int] = ()) -> list[Load]:
        """Slots for items that may be asked for soon, in order, as far as some can be given up.

        ``keep`` is in use beside what a running pass needs.
        """
        needed: Container[int] = self._running.needed if self._running is not None else ()
        kept = {*items, *keep, *(item for item in self._slot_of if item in needed)}
        loads = []
        for item in items:
            if item in self._slot_of:
                continue
            if len(self._arriving) >= self.slots - len(self.pinned) - 1:
                break
            slot = self._place(item, kept, on_trial=True)
            if slot is None:
                break
            self._slot_of[item] = slot
            self._trial[item] = None
            self._arriving.add(item)
            self._ahead.add(item)
            self.counts.prefetched += 1
            loads.append(Load(item, slot))
        return loads

    def arrived(self, item: int) -> None:
        """The prefetch of the item is over."""
        self._arriving.discard(item)

    def lost(self, item: int) -> None:
        """The prefetch of the item failed or was broken off: nobody knows what its slot holds."""
        self._free.append(self._drop(item))

    # What the pass uses.

    def _place(self, item: int, locked: Container[int], *, on_trial: bool) -> int | None:
        """A slot for one more item: a free one, else the least valuable one that is not locked."""
        if self._free:
            return self._free.pop()
        if on_trial and len(self._trial) < self.ring:
            victim = self._policy.evict(item, locked)
            if victim is not None:
                return self._slot_of.pop(victim)
        for victim in self._trial:
            if victim not in locked and victim not in self._arriving:
                return self._drop(victim)
        if on_trial:
            return None
        victim = self._policy.evict(item, locked)
        return None if victim is None else self._slot_of.pop(victim)

    def _force(self, item: int, needed: dict[int, None]) -> int:
        """A slot for the item whose turn it is, when ``_place`` has none: of what is on trial the
        one that is needed last, then anybody's, then that of the unpinned item that is needed last.
        """
        for last in reversed(needed):
            if last in self._trial and last not in self._arriving:
                return self._drop(last)
        victim = self._policy.evict(item, needed)
        if victim is not None:
            return self._slot_of.pop(victim)
        last = next(
            other
            for other in reversed(needed)
            if other in self._slot_of and other not in self.pinned and other not in self._arriving
        )
        return self._drop(last)

    def _enter(self, item: int, slot: int, *, on_trial: bool) -> None:
        self._slot_of[item] = slot
        if on_trial and len(self._trial) < self.ring:
            self._trial[item] = None
        else:
            self._policy.enter(item)

    def _drop(self, item: int) -> int:
        if item in self._trial:
            del self._trial[item]
            self._arriving.discard(item)
            self._ahead.discard(item)
        else:
            self._policy.leave(item)
        return self._slot_of.pop(item)

    def _asked(self, item: int) -> None:
        """A pass that is no scan has used the item."""
        if item in self.pinned:
            return
        if item in self._ahead:
            self._ahead.discard(item)
            self.counts.useful += 1
        if item in self._trial:
            del self._trial[item]
            self._policy.enter(item)
        self._policy.touch((item,))

    def _close(self, unfinished: Sequence[int]) -> None:
        for item in unfinished:
            self._free.append(self._drop(item))
        self._running = None


class Pass:
    """One forward of one layer. Use as a context manager; leaving it early forgets the reads that
    it began.
    """

    def __init__(self, cache: SlotCache, order: Sequence[int], scan: bool) -> None:
        self._cache = cache
        self._scan = scan
        self.needed: dict[int, None] = dict.fromkeys(order)  # in the order of their turns
        assert len(self.needed) == len(order), "a pass names each item once"
        self._loaded: set[int] = set()

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *exc: object) -> None:
        # Items whose reads began here and that were never computed may hold half a record.
        self._cache._close([item for item in self._loaded if item in self.needed])

    def loads(self) -> list[Load]:
        """Reads that may start now, in the order in which they will be needed; the next item's is
        always among them.
        """
        cache = self._cache
        begun = []
        for turn, item in enumerate(self.needed):
            if cache.slot_of(item) is not None:
                continue
            slot = cache._place(item, self.needed, on_trial=self._scan)
            if slot is None:
                if turn > 0:
                    break
                slot = cache._force(item, self.needed)
            cache._enter(item, slot, on_trial=self._scan)
            self._loaded.add(item)
            begun.append(Load(item, slot))
        return begun

    @property
    def complete(self) -> bool:
        """Whether everything that is still needed has a slot: no further read will begin."""
        return all(self._cache.slot_of(item) is not None for item in self.needed)

    def slot(self, item: int) -> int:
        """The slot of the item whose turn it is, after ``loads``."""
        slot = self._cache.slot_of(item)
        assert slot is not None, "ask for the loads first"
        return slot

    def finish(self, item: int) -> None:
        """The item has been computed; it may be evicted from now on."""
        assert next(iter(self.needed)) == item, "items are computed in the order of the pass"
        del self.needed[item]
        cache = self._cache
        if not self._scan:
            cache._asked(item)
        if item in self._loaded:
            cache.counts.misses += 1
        else:
            cache.counts.hits += 1
