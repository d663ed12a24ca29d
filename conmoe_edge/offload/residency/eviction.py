"""Which prototype goes when a cache slot is wanted: one small object a policy, over ints. No torch, no files.

A policy knows the unpinned items that hold a slot, in some order of value, and names the least valuable one:

- ``Lru``: the least recently used.
- ``LayerLru``: least recently used inside each group of layers, which has a quota of slots. Quotas are soft: a group
  that has nothing to give takes from another.
- ``Lfru``: least frequently used with exponential decay, then least recently (LRFU of Lee et al., IEEE Trans.
  Computers 50(12), 2001, with the weight of a use halved every ``half_life`` uses). Items that are gone keep their
  history.

``SlotCache`` gives out the slots, and knows pins and locks. All decisions are integer arithmetic, so a replay of a
trace makes the same ones as the runtime.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Sequence
from typing import Protocol

_EPOCHS = 32  # after so many half-lives the counts of ``Lfru`` are scaled down


class Policy(Protocol):
    """The unpinned resident items in order of value."""

    def enter(self, item: int) -> None:
        """The item has got a slot, and is the most recent now; it has not been asked for yet."""

    def touch(self, items: Iterable[int]) -> None:
        """The items, which have slots, were asked for in this order."""

    def leave(self, item: int) -> None:
        """The item lost its slot for another reason than ``evict``."""

    def evict(self, item: int, locked: Container[int]) -> int | None:
        """Take out the least valuable item that is not locked, to make room for ``item``; ``None`` if there is none."""
        ...


class Lru:
    """Least recently used over all layers."""

    def __init__(self) -> None:
        self._recent: dict[int, None] = {}  # least recently used first

    def enter(self, item: int) -> None:
        """See ``Policy``."""
        self._recent[item] = None

    def touch(self, items: Iterable[int]) -> None:
        """See ``Policy``."""
        recent = self._recent
        for item in items:
            del recent[item]
            recent[item] = None

    def leave(self, item: int) -> None:
        """See ``Policy``."""
        del self._recent[item]

    def evict(self, item: int, locked: Container[int]) -> int | None:
        """See ``Policy``."""
        for victim in self._recent:
            if victim not in locked:
                del self._recent[victim]
                return victim
        return None


class LayerLru:
    """Least recently used inside each group of layers.

    A group at its quota gives from its own; below its quota it takes from the groups above theirs. Where the rule
    names none (all locked, or the quotas leave a group nothing), the least recently used of all goes.
    """

    def __init__(self, group_of: Sequence[int], quotas: Sequence[int]) -> None:
        """``group_of[item]`` is an index into ``quotas``."""
        self._group_of = group_of
        self._quotas = tuple(quotas)
        self._recent: list[dict[int, int]] = [{} for _ in quotas]  # item -> time of its last use
        self._clock = 0

    def enter(self, item: int) -> None:
        """See ``Policy``."""
        self._clock += 1
        self._recent[self._group_of[item]][item] = self._clock

    def touch(self, items: Iterable[int]) -> None:
        """See ``Policy``."""
        clock, recent, group_of = self._clock, self._recent, self._group_of
        for item in items:
            clock += 1
            mine = recent[group_of[item]]
            del mine[item]
            mine[item] = clock
        self._clock = clock

    def leave(self, item: int) -> None:
        """See ``Policy``."""
        del self._recent[self._group_of[item]][item]

    def evict(self, item: int, locked: Container[int]) -> int | None:
        """See ``Policy``."""
        own = self._group_of[item]
        if len(self._recent[own]) >= self._quotas[own]:
            victim = self._oldest([self._recent[own]], locked)
        else:
            above = [r for r, q in zip(self._recent, self._quotas, strict=True) if len(r) > q]
            victim = self._oldest(above, locked)
        if victim is None:
            victim = self._oldest(self._recent, locked)
        if victim is not None:
            self.leave(victim)
        return victim

    @staticmethod
    def _oldest(groups: Sequence[dict[int, int]], locked: Container[int]) -> int | None:
        found: tuple[int, int] | None = None
        for recent in groups:
            for item, time in recent.items():
                if item not in locked:
                    if found is None or time < found[0]:
                        found = (time, item)
                    break
        return None if found is None else found[1]


class Lfru:
    """Decayed frequency, then recency."""

    def __init__(self, half_life: int) -> None:
        """``half_life``: uses (of any item) after which an old use counts half."""
        self._half_life = max(1, half_life)
        self._until_half = self._half_life  # uses until the next half-life
        self._weight = 1  # of a use now; doubling it is the same as halving all counts
        self._clock = 0
        self._count: dict[int, int] = {}
        self._last: dict[int, int] = {}  # resident items -> time of last use
        # One entry a resident item, at or below its present value: values only grow, so an entry that is
        # out of date is put right when it comes to the top.
        self._heap: list[tuple[int, int, int]] = []

    def enter(self, item: int) -> None:
        """See ``Policy``."""
        self._clock += 1
        self._last[item] = self._clock
        heapq.heappush(self._heap, self._key(item))

    def touch(self, items: Iterable[int]) -> None:
        """See ``Policy``."""
        count, last = self._count, self._last
        for item in items:
            if self._until_half == 0:
                self._age()
                count = self._count
            self._until_half -= 1
            self._clock += 1
            count[item] = count.get(item, 0) + self._weight
            last[item] = self._clock

    def leave(self, item: int) -> None:
        """See ``Policy``."""
        del self._last[item]
        self._heap = [entry for entry in self._heap if entry[2] != item]
        heapq.heapify(self._heap)

    def evict(self, item: int, locked: Container[int]) -> int | None:
        """See ``Policy``."""
        heap, aside, victim = self._heap, [], None
        while heap:
            entry = heap[0]
            key = self._key(entry[2])
            if key != entry:
                heapq.heapreplace(heap, key)
            elif entry[2] in locked:
                aside.append(heapq.heappop(heap))
            else:
                victim = heapq.heappop(heap)[2]
                del self._last[victim]
                break
        for entry in aside:
            heapq.heappush(heap, entry)
        return victim

    def _key(self, item: int) -> tuple[int, int, int]:
        return self._count.get(item, 0), self._last[item], item

    def _age(self) -> None:
        self._until_half = self._half_life
        self._weight *= 2
        if self._weight < 1 << _EPOCHS:
            return
        self._weight = 1
        self._count = {item: count >> _EPOCHS for item, count in self._count.items()}
        self._heap = [self._key(item) for item in self._last]
        heapq.heapify(self._heap)
