"""What a server sets aside for requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.plan.requests import (
    LARGEST_BODY,
    PARSING_BYTES,
    PYTHON_TEXT_BYTES,
    SHARE,
    TOKENISING_BYTES,
    request_sizes,
)
from conmoe_edge.units import GIB, MIB


@given(
    st.integers(256 * MIB, 1 << 40),
    st.integers(1, 1 << 17),
    st.none() | st.integers(1, 1024),
)
def test_what_is_looked_at_is_inside_what_is_set_aside(
    budget: int, context: int, longest: int | None
) -> None:
    sizes = request_sizes(budget, context, longest)
    looked_at = TOKENISING_BYTES * sizes.text + PARSING_BYTES * sizes.body
    assert looked_at + sizes.account <= sizes.nbytes + PYTHON_TEXT_BYTES
    assert 0 < sizes.text <= LARGEST_BODY >= sizes.body
    if context <= 4096:
        assert sizes.nbytes <= budget / SHARE + MIB


def test_a_body_holds_every_text_that_could_fit() -> None:
    """However its characters are escaped, where the budget has room for it."""
    sizes = request_sizes(8 * GIB, 2048, 33)
    assert sizes.text == 2048 * 33
    assert sizes.body >= 6 * sizes.text


@pytest.mark.parametrize("longest", [16, 128, None])
def test_more_budget_takes_no_less(longest: int | None) -> None:
    found = [request_sizes(n * 256 * MIB, 4096, longest) for n in range(1, 40)]
    assert [one.text for one in found] == sorted(one.text for one in found)
    assert [one.account for one in found] == sorted(one.account for one in found)
