"""How many slots a budget holds."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from conmoe_edge.offload.residency.quota import halved, slots_for

RECORDS = st.lists(
    st.tuples(st.integers(1, 1000).map(lambda n: n * 4096), st.integers(0, 50)),
    min_size=1,
    max_size=4,
)


@given(RECORDS, st.integers(0, 10**8), st.integers(0, 10**9))
def test_slots_never_exceed_the_budget(
    records: list[tuple[int, int]], fixed: int, budget: int
) -> None:
    assume(sum(nbytes for nbytes, count in records if count) <= budget - fixed)
    slots = slots_for(budget, fixed, records)
    used = sum(n * nbytes for n, (nbytes, _) in zip(slots, records, strict=True))
    assert used <= max(0, budget - fixed)
    for n, (nbytes, count) in zip(slots, records, strict=True):
        assert (1 if count else 0) <= n <= count
        assert n == count or nbytes > budget - fixed - used, "memory was left for one more slot"


def test_everything_where_it_fits() -> None:
    assert slots_for(10 * 4096, 4096, [(4096, 9)]) == (9,)
    assert slots_for(9 * 4096, 4096, [(4096, 9)]) == (8,)
    assert slots_for(2 * 4096, 4096, [(4096, 9)]) == (1,)


def test_halved_ends_at_one_slot() -> None:
    slots: tuple[int, ...] | None = (9, 0, 2)
    seen = []
    while slots is not None:
        seen.append(slots)
        slots = halved(slots)
    assert seen == [(9, 0, 2), (4, 0, 1), (2, 0, 1), (1, 0, 1)]
