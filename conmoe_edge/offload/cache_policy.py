"""Which cache slot holds which prototype: pure arithmetic on ints, no torch, no files, no memory.

A ``SlotCache`` has ``slots`` places. A layer's forward opens a ``Pass`` over the prototypes it
needs, in the order in which it will compute them, and then, prototype by prototype: asks for the
``loads`` that may start now, computes, and says ``finish``. Somebody else moves the bytes.

Rules (each is tested against a brute-force model):

- What a pass still needs is *locked*: it is evicted only when its own pass cannot go on otherwise,
  that is, when the very next prototype is missing and every unpinned slot holds something that the
  same pass needs later. Then the one that is needed last goes, and is read again when its turn
  comes. So one unpinned slot is enough for any pass, and the order of computation never depends on
  the number of slots.
- A slot that was assigned in a pass is not assigned again before the pass has finished with it:
  reads that are under way are never overwritten.
- Otherwise the victim is the least recently used prototype that is not pinned (global over all
  layers).
- Pinned prototypes stay. At least one slot is never pinned unless every prototype has a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """Read prototype ``item`` into cache slot ``slot``."""

    item: int
    slot: int


@dataclass(slots=True)
class CacheCounts:
    """What passes asked for: ``hits`` were there when their turn came, ``misses`` had to be
    read.
    """

    hits: int = 0
    misses: int = 0


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


class SlotCache:
    """Least recently used over ``slots`` places, with pins. One pass at a time."""

    def __init__(self, slots: int, pins: Sequence[int] = ()) -> None:
        assert slots >= 1, "a cache needs a slot"
        assert len(set(pins)) == len(pins) <= slots, "pins are distinct and have a slot each"
        self.slots = slots
        self.pinned = frozenset(pins)
        self.counts = CacheCounts()
        self._slot_of: dict[int, int] = {}
        self._recent: dict[int, None] = {}  # unpinned resident items, least recently used first
        self._free = list(range(slots - 1, -1, -1))  # taken from the end, lowest number first
        self._running: Pass | None = None

    def slot_of(self, item: int) -> int | None:
        """The slot that holds (or is being filled with) the item."""
        return self._slot_of.get(item)

    @property
    def resident(self) -> frozenset[int]:
        """The items that have a slot."""
        return frozenset(self._slot_of)

    def fill(self, items: Sequence[int]) -> list[Load]:
        """Before the first pass: give slots to the pins and then to ``items`` in order, while
        there are free ones.
        """
        assert self._running is None, "filling happens between passes"
        loads = []
        for item in [*sorted(self.pinned), *items]:
            if item in self._slot_of or not self._free:
                continue
            loads.append(Load(item, self._free.pop()))
            self._enter(item, loads[-1].slot)
        return loads

    def begin(self, order: Sequence[int]) -> Pass:
        """Open a pass over distinct items in the order of their computation."""
        assert self._running is None, "one pass at a time"
        self._running = Pass(self, order)
        return self._running

    # What the pass uses.

    def _enter(self, item: int, slot: int) -> None:
        self._slot_of[item] = slot
        if item not in self.pinned:
            self._recent[item] = None

    def _drop(self, item: int) -> int:
        self._recent.pop(item, None)
        return self._slot_of.pop(item)

    def _touch(self, item: int) -> None:
        if item in self._recent:
            del self._recent[item]
            self._recent[item] = None

    def _place(self, locked: dict[int, int]) -> int | None:
        """A slot for one more item: a free one, else that of the least recently used item that is
        not locked.
        """
        if self._free:
            return self._free.pop()
        for item in self._recent:
            if item not in locked:
                return self._drop(item)
        return None

    def _displace(self, locked: dict[int, int]) -> int:
        """The slot of the locked, unpinned item that is needed last."""
        last = max((i for i in self._recent), key=lambda i: locked[i])
        return self._drop(last)

    def _close(self, unfinished: Sequence[int]) -> None:
        for item in unfinished:
            self._free.append(self._drop(item))
        self._running = None


class Pass:
    """One forward of one layer. Use as a context manager; leaving it early forgets the reads that
    it began.
    """

    def __init__(self, cache: SlotCache, order: Sequence[int]) -> None:
        self._cache = cache
        self._turn = {
            item: turn for turn, item in enumerate(order)
        }  # what is still needed, in order
        assert len(self._turn) == len(order), "a pass names each item once"
        self._loaded: set[int] = set()

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *exc: object) -> None:
        # Items whose reads began here and that were never computed may hold half a record.
        self._cache._close([item for item in self._loaded if item in self._turn])

    def loads(self) -> list[Load]:
        """Reads that may start now, in the order in which they will be needed; the next item's is
        always among them.
        """
        begun = []
        for turn, item in enumerate(self._turn):
            if self._cache.slot_of(item) is not None:
                continue
            slot = self._cache._place(self._turn)
            if slot is None:
                if turn > 0:
                    break
                slot = self._cache._displace(self._turn)
            self._cache._enter(item, slot)
            self._loaded.add(item)
            begun.append(Load(item, slot))
        return begun

    def slot(self, item: int) -> int:
        """The slot of the item whose turn it is, after ``loads``."""
        slot = self._cache.slot_of(item)
        assert slot is not None, "ask for the loads first"
        return slot

    def finish(self, item: int) -> None:
        """The item has been computed; it may be evicted from now on."""
        assert next(iter(self._turn)) == item, "items are computed in the order of the pass"
        del self._turn[item]
        self._cache._touch(item)
        if item in self._loaded:
            self._cache.counts.misses += 1
        else:
            self._cache.counts.hits += 1
