"""How many slots a budget holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.errors import DoesNotFit
from conmoe_edge.offload.residency.quota import halved, slots_for
from conmoe_edge.units import parse_size

RECORDS = st.lists(
    st.tuples(st.integers(1, 1000).map(lambda n: n * 4096), st.integers(0, 50)),
    min_size=1,
    max_size=4,
)


@given(RECORDS, st.integers(0, 10**8), st.integers(0, 10**9))
def test_slots_never_exceed_the_budget(
    records: list[tuple[int, int]], fixed: int, budget: int
) -> None:
    try:
        slots = slots_for(budget, fixed, records)
    except DoesNotFit:
        assert sum(nbytes for nbytes, count in records if count) > budget - fixed
        return
    used = sum(n * nbytes for n, (nbytes, _) in zip(slots, records, strict=True))
    assert used <= max(0, budget - fixed)
    for n, (nbytes, count) in zip(slots, records, strict=True):
        assert (1 if count else 0) <= n <= count
        assert n == count or nbytes > budget - fixed - used, "memory was left for one more slot"


def test_everything_where_it_fits() -> None:
    assert slots_for(10 * 4096, 4096, [(4096, 9)]) == (9,)
    assert slots_for(9 * 4096, 4096, [(4096, 9)]) == (8,)


def test_the_least_budget_in_the_message_works() -> None:
    with pytest.raises(DoesNotFit) as caught:
        slots_for(5_000_000, 123_456_789, [(12_582_912, 64)])
    size = next(word for word in caught.value.fix.replace(",", "").split() if word.endswith("GB"))
    nbytes = parse_size(size)
    assert nbytes is not None
    assert slots_for(nbytes, 123_456_789, [(12_582_912, 64)]) == (1,)


def test_halved_ends_at_one_slot() -> None:
    slots: tuple[int, ...] | None = (9, 0, 2)
    seen = []
    while slots is not None:
        seen.append(slots)
        slots = halved(slots)
    assert seen == [(9, 0, 2), (4, 0, 1), (2, 0, 1), (1, 0, 1)]
