"""The cache policy against a brute-force model of its rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.offload.residency.eviction import LayerLru, Lfru, Lru, Policy
from conmoe_edge.offload.residency.slot_cache import Load, SlotCache, pin_order

ITEMS = 12


class Brute:
    """Residency by the letter of the rules: a list in order of last use, scanned anew for every
    decision.
    """

    def __init__(self, slots: int, pins: tuple[int, ...]) -> None:
        self.slots = slots
        self.pins = set(pins)
        self.held: list[int] = list(pins)  # least recently used first

    def run(self, order: list[int]) -> list[tuple[int, bool]]:
        """(item, was it there when its turn came), for the items of one pass."""
        result = []
        loaded: set[int] = set()
        for turn, _ in enumerate(order):
            remaining = order[turn:]
            for position, item in enumerate(remaining):
                if item in self.held:
                    continue
                if len(self.held) >= self.slots:
                    idle = [i for i in self.held if i not in self.pins and i not in remaining]
                    if idle:
                        self.held.remove(idle[0])
                    elif position > 0:
                        break
                    else:
                        mine = [i for i in self.held if i not in self.pins]
                        self.held.remove(max(mine, key=remaining.index))
                self.held.append(item)
                loaded.add(item)
            item = remaining[0]
            result.append((item, item not in loaded))
            self.held.remove(item)
            self.held.append(item)
        return result


@st.composite
def _caches(draw: st.DrawFn) -> tuple[int, tuple[int, ...], list[list[int]]]:
    slots = draw(st.integers(1, ITEMS))
    pins = draw(st.lists(st.integers(0, ITEMS - 1), unique=True, max_size=slots - 1))
    passes = draw(
        st.lists(st.lists(st.integers(0, ITEMS - 1), unique=True, max_size=ITEMS), max_size=8)
    )
    return slots, tuple(pins), passes


@settings(max_examples=400, deadline=None)
@given(_caches())
def test_same_decisions_as_the_rules(case: tuple[int, tuple[int, ...], list[list[int]]]) -> None:
    slots, pins, passes = case
    cache = SlotCache(slots, pins)
    brute = Brute(slots, tuple(sorted(pins)))
    cache.fill([])
    hits = misses = 0
    for order in passes:
        expected = brute.run(order)
        seen: list[tuple[int, bool]] = []
        in_flight: dict[int, int] = {}  # slot -> item, reads that were begun and not yet computed
        with cache.begin(order) as one:
            for item in order:
                for load in one.loads():
                    assert load.place[1] not in in_flight, (
                        "a slot whose record is being read was given away"
                    )
                    in_flight[load.place[1]] = load.item
                slot = cache.slot_of(item)
                seen.append((item, slot not in in_flight))
                in_flight.pop(slot, None)
                one.finish(item)
        assert seen == expected
        hits += sum(was_there for _, was_there in seen)
        misses += sum(not was_there for _, was_there in seen)
        assert cache.resident == set(brute.held)
        assert len({cache.slot_of(item) for item in cache.resident}) == len(cache.resident) <= slots
        assert set(pins) <= cache.resident
    assert (cache.counts.hits, cache.counts.misses) == (hits, misses)


def test_one_slot_serves_any_pass() -> None:
    cache = SlotCache(1)
    order = [3, 1, 2]
    with cache.begin(order) as one:
        for item in order:
            (load,) = one.loads()
            assert (load.item, load.place[1]) == (item, 0)
            one.finish(item)
    assert (cache.counts.hits, cache.counts.misses) == (0, 3)


def test_reads_start_ahead_of_the_computation() -> None:
    cache = SlotCache(3)
    with cache.begin([0, 1, 2, 3]) as one:
        assert [load.item for load in one.loads()] == [0, 1, 2]
        one.finish(0)
        assert [(load.item, load.place[1]) for load in one.loads()] == [(3, 0)]


def test_a_pass_that_fails_forgets_what_it_began_to_read() -> None:
    cache = SlotCache(2)
    with pytest.raises(RuntimeError), cache.begin([4, 5]) as one:
        one.loads()
        one.finish(4)
        raise RuntimeError
    assert cache.resident == {4}
    with cache.begin([5]) as one:
        assert [load.item for load in one.loads()] == [5]
        one.finish(5)


def test_fill_takes_the_pins_first() -> None:
    cache = SlotCache(3, pins=(7,))
    assert [load.item for load in cache.fill([0, 1, 2, 3])] == [7, 0, 1]


def test_pins_are_the_heaviest_and_ties_go_to_the_lowest_number() -> None:
    weights = [0.1, 0.4, 0.4, 0.05, 0.05]
    assert pin_order(weights, 4) == (1, 2)
    assert pin_order(weights, 1) == ()
    assert pin_order(weights, 2) == (1,)
    assert pin_order(weights, 5) == (0, 1, 2, 3, 4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 30))
def test_a_slot_is_left_unpinned_unless_everything_has_one(
    weights: list[float], slots: int
) -> None:
    pins = pin_order(weights, slots)
    if slots >= len(weights):
        assert len(pins) == len(weights)
    else:
        assert len(pins) < slots
        assert len(pins) <= slots / 2


GROUP_OF = tuple(item * 3 // ITEMS for item in range(ITEMS))


def _policy(kind: str) -> Policy:
    return {"lru": Lru(), "layer-lru": LayerLru(GROUP_OF, (2, 1, 1)), "lfru": Lfru(6)}[kind]


@st.composite
def _mixed(
    draw: st.DrawFn,
) -> tuple[int, tuple[int, ...], str, list[tuple[list[int], bool, list[int]]]]:
    slots = draw(st.integers(1, ITEMS))
    pins = draw(st.lists(st.integers(0, ITEMS - 1), unique=True, max_size=slots - 1))
    items = st.lists(st.integers(0, ITEMS - 1), unique=True, max_size=ITEMS)
    passes = draw(st.lists(st.tuples(items, st.booleans(), items), max_size=8))
    return slots, tuple(pins), draw(st.sampled_from(["lru", "layer-lru", "lfru"])), passes


@settings(max_examples=200, deadline=None)
@given(_mixed(), st.data())
def test_no_policy_scan_or_prefetch_breaks_a_rule(
    case: tuple[int, tuple[int, ...], str, list[tuple[list[int], bool, list[int]]]],
    data: st.DataObject,
) -> None:
    slots, pins, kind, passes = case
    cache = SlotCache(slots, pins, _policy(kind))
    cache.fill(list(range(ITEMS)))
    reading: dict[int, int] = {}  # slot -> item: reads that are under way

    def begun(loads: list[Load]) -> None:
        for load in loads:
            assert load.place[1] not in reading, "a slot that is being read into was given away"
            reading[load.place[1]] = load.item

    for order, scan, ahead in passes:
        loaded: list[int] = []
        there = cache.resident
        with cache.begin(order, scan=scan) as one:
            for turn, item in enumerate(order):
                loads = one.loads()
                begun(loads)
                loaded += [load.item for load in loads]
                held = [i for i in order[turn:] if cache.slot_of(i) is not None]
                way = data.draw(st.sampled_from([None, cache.prefetch, cache.read_on]))
                if way is not None:
                    begun(way(ahead))
                    assert all(cache.slot_of(i) is not None for i in held), "a locked item went"
                reading.pop(cache.slot_of(item), None)
                cache.table.arrived(item)
                one.finish(item)
        assert len(loaded) == len(set(loaded)), "a pass reads a record once at the most"
        assert set(loaded) >= set(order) - there - cache.resident - set(ahead)
        assert set(pins) <= cache.resident
        places = [cache.slot_of(item) for item in cache.resident]
        assert len(set(places)) == len(places) <= slots
        way = data.draw(st.sampled_from([None, cache.prefetch, cache.read_on]))
        if way is not None:
            begun(way(ahead))
        for item in sorted(cache.arriving):
            slot = cache.slot_of(item)
            assert slot is not None and reading[slot] == item
            end = data.draw(st.sampled_from([None, cache.table.arrived, cache.taken_back]))
            if end is not None:
                end(item)
                del reading[slot]
    assert cache.counts.useful <= cache.counts.prefetched
    assert cache.counts.hits + cache.counts.misses == sum(len(order) for order, _, _ in passes)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(3, 40),
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from(["lru", "layer-lru", "lfru"]),
)
def test_scans_keep_what_is_resident(slots: int, more: int, layers: int, kind: str) -> None:
    """Chunk after chunk over P > S prototypes in L layers: at least S - ring are there each time."""
    count = slots + more
    policies: dict[str, Policy] = {
        "lru": Lru(),
        "layer-lru": LayerLru(
            [n * layers // count for n in range(count)], [slots // layers] * layers
        ),
        "lfru": Lfru(slots),
    }
    cache = SlotCache(slots, (), policies[kind])
    cache.fill(range(count))
    for _ in range(4):
        before = cache.counts.hits
        for layer in range(layers):
            order = [n for n in range(count) if n * layers // count == layer]
            with cache.begin(order, scan=True) as one:
                for item in order:
                    one.loads()
                    one.finish(item)
        assert cache.counts.hits - before >= slots - cache.ring
    assert 2 <= cache.ring <= max(4, slots // 8)


def test_a_scan_leaves_what_decode_uses() -> None:
    cache = SlotCache(16)
    cache.fill(range(16))
    for _ in range(3):
        with cache.begin(range(8)) as one:
            for item in range(8):
                one.loads()
                one.finish(item)
    with cache.begin(range(16, 64), scan=True) as one:
        for item in range(16, 64):
            one.loads()
            one.finish(item)
    assert set(range(8)) <= cache.resident
    # What is on trial goes first when decode misses, and stays once decode has asked for it.
    trial = sorted(cache.resident - set(range(16)))
    with cache.begin(trial[:1]) as one:
        one.finish(trial[0])
    with cache.begin([70]) as one:
        one.loads()
        one.finish(70)
    assert trial[0] in cache.resident and trial[1] not in cache.resident


def test_what_is_read_for_the_next_scan_is_its_own_and_costs_nothing_resident() -> None:
    cache = SlotCache(16)
    cache.fill(range(16))
    assert cache.ring == 2
    read = 0
    for first in range(16, 48, 8):
        order, after = range(first, first + 8), range(first + 8, first + 16)
        with cache.begin(order, scan=True) as one:
            for item in order:
                read += len(one.loads())
                cache.table.arrived(item)
                if one.complete:
                    read += len(cache.read_on(after))
                one.finish(item)
        read += len(cache.read_on(after))
        assert [item in cache.arriving for item in after][:2] == [True, True]
    assert set(range(14)) <= cache.resident
    assert (cache.counts.misses, read) == (32, 34), "each read once, and two for a scan to come"
    assert (cache.counts.hits, cache.counts.prefetched) == (0, 0)
    cache.taken_back(48)
    assert cache.slot_of(48) is None and cache.slot_of(49) is not None


def test_prefetch_takes_no_locked_slot_and_never_the_last() -> None:
    cache = SlotCache(3)
    cache.fill([0, 1, 2])
    with cache.begin([0, 1]) as one:
        assert [load.item for load in cache.prefetch([5, 6, 7])] == [5]
        one.finish(0)
        one.finish(1)
    assert [load.item for load in cache.prefetch([5, 6, 7])] == [6]
    assert cache.prefetch([8]) == [], "two of three slots are being read into"
    cache.lost(6)
    assert cache.resident == {5} | (cache.resident - {6})
    with cache.begin([5, 9]) as one:
        assert [load.item for load in one.loads()] == [9]
        cache.table.arrived(5)
        one.finish(5)
        one.finish(9)
    assert (cache.counts.prefetched, cache.counts.useful) == (2, 1)
