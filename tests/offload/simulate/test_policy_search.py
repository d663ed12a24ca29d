"""The replay against the runtime's own bookkeeping, miss curves and quotas against their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.checkpoint.format.manifest import (
    CacheSettings,
    ExpertId,
    Manifest,
    PrototypeEntry,
    RecordLayout,
    SlotRecord,
)
from conmoe_edge.offload.residency.policies import (
    POLICIES,
    LayoutTable,
    make_policy,
    pins_of,
    warm_order,
)
from conmoe_edge.offload.residency.quota import allot, groups_of, miss_curve
from conmoe_edge.offload.residency.slot_cache import SlotCache
from conmoe_edge.offload.simulate.policy_search import choose, replay
from conmoe_edge.plan.trace import PrototypeTrace, RoutingTrace, to_prototypes

LAYERS, EACH = 3, 5
COUNT = LAYERS * EACH
TABLE = LayoutTable(
    tuple(range(COUNT)),
    tuple((n * 7 % COUNT) / 100 for n in range(COUNT)),
    tuple(n // EACH for n in range(COUNT)),
)


def by_slots(rows: Sequence[Sequence[int]], one: CacheSettings) -> int:
    """Hits of the real cache, with passes that compute first what is there."""
    cache = SlotCache(one.slots, pins_of(one, TABLE), make_policy(one, TABLE))
    cache.fill(warm_order(one, TABLE))
    for row in rows:
        order = sorted(row, key=lambda n: cache.slot_of(n) is None)
        with cache.begin(order) as running:
            for number in order:
                running.loads()
                running.finish(number)
    return cache.counts.hits


ROWS = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EACH - 1), min_size=1)),
    max_size=40,
).map(lambda rows: [tuple(sorted(layer * EACH + n for n in row)) for layer, row in rows])


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(1, COUNT), st.sampled_from(POLICIES), st.sampled_from([0.25, 0.5]))
def test_the_replay_makes_the_decisions_of_the_runtime(
    rows: list[tuple[int, ...]], slots: int, policy: str, share: float
) -> None:
    one = CacheSettings(slots, policy, share if policy == "pins" else 0.0)
    if policy == "layer-lru":
        one = replace(one, quotas=allot([[1] * EACH] * LAYERS, slots))
    hits, asked = replay(rows, one, TABLE)
    assert asked == sum(len(row) for row in rows)
    assert hits == by_slots(rows, one)
    middle = len(rows) // 2
    late, late_asked = replay(rows, one, TABLE, middle)
    assert late == hits - by_slots(rows[:middle], one)
    assert late_asked == sum(len(row) for row in rows[middle:])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=4).map(sorted), max_size=30))
def test_miss_curve_by_the_letter(rows: list[list[int]]) -> None:
    curve = miss_curve(rows, 7)
    assert curve[0] == sum(len(row) for row in rows)
    assert all(before >= after for before, after in pairwise(curve))
    for slots in range(1, 8):
        assert curve[slots] == sum(_misses_of_a_step(rows, slots))


def _misses_of_a_step(rows: list[list[int]], slots: int) -> list[int]:
    """By the letter: an item is there if fewer than ``slots`` others were used since, later ones of its row among
    them.
    """
    uses: list[int] = []
    missed = []
    for row in rows:
        count = 0
        for item in row:
            if item not in uses:
                count += 1
                continue
            last = len(uses) - 1 - uses[::-1].index(item)
            count += len(set(uses[last + 1 :])) >= slots
        missed.append(count)
        uses += row
    return missed


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=4).map(lambda g: sorted(g)[::-1]), max_size=3),
    st.integers(0, 12),
)
def test_quotas_are_the_best_there_are(gains: list[list[int]], slots: int) -> None:
    """For concave curves the greedy choice is the best of all."""
    quotas = allot(gains, slots)
    assert sum(quotas) == min(slots, sum(map(len, gains)))
    every = [(g, i) for g, gain in enumerate(gains) for i in range(len(gain))]
    best = max(
        (sum(gains[g][i] for g, i in some) for some in combinations(every, sum(quotas))), default=0
    )
    assert sum(sum(gain[:quota]) for gain, quota in zip(gains, quotas, strict=True)) == best


def test_quotas_look_beyond_a_step_that_saves_nothing() -> None:
    assert allot([[0, 0, 9], [2, 2, 2]], 3) == (3, 0)
    assert allot([[0, 0, 9], [2, 2, 2]], 2) == (0, 2)
    assert allot([[0, 0, 9], [2, 2, 2]], 4, least=(1, 2)) == (1, 3)
    assert allot([[5], [5]], 1) == (1, 0)


def _manifest(layouts: Sequence[int], slots: dict[int, list[tuple[int, int]]]) -> Manifest:
    ids = sorted({ExpertId(*one) for row in slots.values() for one in row})
    return Manifest(
        source={},
        method="conmoe",
        rate=0.0,
        scope=1,
        precision="source",
        layouts=tuple(RecordLayout("source", (), 4096) for _ in range(max(layouts) + 1)),
        prototypes=tuple(
            PrototypeEntry(one, "f", 4096, layout, 1 / len(ids))
            for one, layout in zip(ids, layouts, strict=True)
        ),
        slots={
            layer: tuple(SlotRecord(ExpertId(*one)) for one in row) for layer, row in slots.items()
        },
        files={},
    )


def test_layers_that_share_a_prototype_are_one_group() -> None:
    apart = _manifest([0] * 4, {3: [(3, 0), (3, 1)], 5: [(5, 0), (5, 1)]})
    assert groups_of(apart) == (0, 0, 1, 1)
    shared = _manifest([0] * 4, {1: [(1, 0)], 3: [(3, 0), (5, 0)], 5: [(5, 0), (5, 1)]})
    assert groups_of(shared) == (0, 1, 1, 1)


def _skewed(tokens: int) -> PrototypeTrace:
    """Layer 0 goes round its four prototypes, layer 1 stays with one."""
    return PrototypeTrace(
        (0, 1), (tokens,), (tuple((t % 4,) for t in range(tokens)), ((4,),) * tokens)
    )


TWO_LAYERS = _manifest([0] * 8, {0: [(0, n) for n in range(4)], 1: [(1, n) for n in range(4)]})


def test_the_best_of_the_second_half_is_chosen() -> None:
    (one,) = choose(_skewed(64), TWO_LAYERS, [5])
    assert one.predicted_hit == 1.0 and one.slots == 5
    assert one.predicted_hit == max(one.candidates.values())
    assert set(one.candidates) == {"lru", "layer-lru", "lfru", "pins 25%", "pins 50%"}
    (one,) = choose(_skewed(64), TWO_LAYERS, [4])
    assert one.candidates["lru"] == 0.5, "round and round is what least recently used is worst at"
    assert one.predicted_hit is not None and one.predicted_hit > 0.5 and one.policy != "lru"
    (forced,) = choose(_skewed(64), TWO_LAYERS, [4], "layer-lru")
    assert forced.policy == "layer-lru" and sum(forced.quotas) == 4
    assert choose(_skewed(64), TWO_LAYERS, [8]) == ()


def test_layouts_are_chosen_for_apart() -> None:
    mixed = _manifest(
        [0, 1, 0, 1, 0, 1, 0, 1],
        {0: [(0, n) for n in range(4)], 1: [(1, n) for n in range(4)]},
    )
    first, second = choose(_skewed(64), mixed, [1, 2])
    assert first.slots == 1 and second.slots == 2
    assert second.predicted_hit == 1.0, "two of layer 0 take turns, and have a slot each"


def test_part_of_a_trace_is_whole_sequences() -> None:
    trace = PrototypeTrace((0,), (1, 2, 1), (((1,), (2, 4), (3,), (5,)),))
    assert trace.requests == 5
    assert trace.every(1) == trace
    assert trace.every(2) == PrototypeTrace((0,), (1, 1), (((1,), (5,)),))


def test_slots_that_meet_on_a_prototype_ask_once_and_skip_marks_for_nothing() -> None:
    trace = RoutingTrace((2, 4), (2,), (((0, 1), (3, 2)), ((1, 0), (0, 3))))
    asked = to_prototypes(trace, {2: [7, 7, 5], 4: [9, -1, 8]})
    assert asked.asked == (((7,), (5,)), ((9,), (9,)))
    assert list(asked.decode()) == [(0, (7,)), (1, (9,)), (0, (5,)), (1, (9,))]
    assert list(asked.only([n == 9 for n in range(10)]).decode()) == [(1, (9,)), (1, (9,))]
