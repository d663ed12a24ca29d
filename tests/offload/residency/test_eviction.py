"""Every policy against a brute-force model of its rule: all items, scanned anew for every decision."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.offload.residency import eviction
from conmoe_edge.offload.residency.eviction import LayerLru, Lfru, Lru

ITEMS = 9
GROUP_OF = (0, 0, 0, 1, 1, 1, 1, 2, 2)
HALF_LIFE = 3

# enter, touch, evict (for an item, with some locked), leave
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "touch", "touch", "evict", "leave"]),
        st.integers(0, ITEMS - 1),
        st.frozensets(st.integers(0, ITEMS - 1), max_size=5),
    ),
    max_size=60,
)


class Brute:
    """Remembers everything that happened; subclasses say who is worth least."""

    def __init__(self) -> None:
        self.time = 0
        self.uses = 0
        self.seen: dict[int, int] = {}  # resident -> last time
        self.used: dict[int, list[int]] = {}  # item -> numbers of its uses

    def step(self, what: str, item: int, locked: frozenset[int]) -> int | None:
        self.time += 1
        if what == "enter":
            self.seen[item] = self.time
        elif what == "touch":
            self.seen[item] = self.time
            self.used.setdefault(item, []).append(self.uses)
            self.uses += 1
        elif what == "leave":
            del self.seen[item]
        else:
            victim = self.victim(item, [i for i in self.seen if i not in locked])
            if victim is not None:
                del self.seen[victim]
            return victim
        return None

    def oldest(self, items: list[int]) -> int | None:
        return min(items, key=lambda i: self.seen[i], default=None)

    def victim(self, item: int, free: list[int]) -> int | None:
        return self.oldest(free)


class BruteLayers(Brute):
    def __init__(self, quotas: tuple[int, ...]) -> None:
        super().__init__()
        self.quotas = quotas

    def victim(self, item: int, free: list[int]) -> int | None:
        held = [sum(GROUP_OF[i] == g for i in self.seen) for g in range(3)]
        own = GROUP_OF[item]
        above = {g for g in range(3) if held[g] > self.quotas[g]}
        groups = {own} if held[own] >= self.quotas[own] else above
        first = self.oldest([i for i in free if GROUP_OF[i] in groups])
        return self.oldest(free) if first is None else first


class BruteFrequency(Brute):
    def victim(self, item: int, free: list[int]) -> int | None:
        def worth(one: int) -> tuple[Fraction, int]:
            now = self.uses // HALF_LIFE
            uses = self.used.get(one, [])
            return sum((Fraction(1, 2 ** (now - u // HALF_LIFE)) for u in uses), Fraction()), (
                self.seen[one]
            )

        return min(free, key=worth, default=None)


def _same(policy: Any, brute: Brute, steps: list[tuple[str, int, frozenset[int]]]) -> None:
    for what, item, locked in steps:
        if (what in ("touch", "leave")) != (item in brute.seen) and what != "evict":
            continue  # only what has a slot is touched or leaves, only what has none enters
        if what == "evict" and item in brute.seen:
            continue
        expected = brute.step(what, item, locked)
        if what == "touch":
            policy.touch((item,))
        elif what == "evict":
            assert policy.evict(item, locked) == expected
        else:
            getattr(policy, what)(item)
    while brute.seen:
        assert policy.evict(0, ()) == brute.step("evict", 0, frozenset())
    assert policy.evict(0, ()) is None


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_lru(steps: list[tuple[str, int, frozenset[int]]]) -> None:
    _same(Lru(), Brute(), steps)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.tuples(*[st.integers(0, 4)] * 3))
def test_layer_lru(
    steps: list[tuple[str, int, frozenset[int]]], quotas: tuple[int, int, int]
) -> None:
    _same(LayerLru(GROUP_OF, quotas), BruteLayers(quotas), steps)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_lfru(steps: list[tuple[str, int, frozenset[int]]]) -> None:
    _same(Lfru(HALF_LIFE), BruteFrequency(), steps)


def test_lfru_goes_on_when_its_counts_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "_EPOCHS", 4)
    policy = Lfru(2)
    for item in range(3):
        policy.enter(item)
    for _ in range(50):
        policy.touch((1, 2, 2))
    assert [policy.evict(9, ()) for _ in range(3)] == [0, 1, 2]


def test_an_old_favourite_goes_when_its_time_is_over() -> None:
    policy = Lfru(8)
    policy.enter(0)
    policy.enter(1)
    policy.touch([0] * 8)
    policy.touch([1] * 8)
    policy.touch([1] * 8)
    assert policy.evict(2, ()) == 0
