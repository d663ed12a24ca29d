"""Which record every expert becomes: against trying everything, and what must hold of it."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.compress.solvers.record_menu import Menu

NBYTES = (2, 3, 3, 5, 8)

Errors = list[list[float]]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Errors, list[float]]:
    """Errors of a few experts in every option, in no order; without an expert more is lost than in any of them."""
    row = st.lists(st.integers(0, 9), min_size=len(NBYTES), max_size=len(NBYTES))
    errors = [[float(one) for one in own] for own in draw(st.lists(row, min_size=1, max_size=3))]
    more = draw(st.lists(st.integers(0, 9), min_size=len(errors), max_size=len(errors)))
    return errors, [max(own) + extra for own, extra in zip(errors, more, strict=True)]


def total(errors: Errors, nothing: list[float], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(
        gone if one < 0 else own[one]
        for own, gone, one in zip(errors, nothing, chosen, strict=True)
    )


def nbytes_of(chosen: tuple[int, ...] | list[int]) -> int:
    return sum(NBYTES[one] for one in chosen if one >= 0)


@given(tables(), st.integers(2, 26))
@settings(max_examples=200, deadline=None)
def test_a_choice_is_within_the_room_and_within_a_step_of_the_best(
    table: tuple[Errors, list[float]], room: int
) -> None:
    errors, nothing = table
    chosen = Menu.of(NBYTES, errors, nothing).chosen(room)
    assert chosen is not None and nbytes_of(chosen) <= room
    every = itertools.product(range(-1, len(NBYTES)), repeat=len(errors))
    best = min(total(errors, nothing, one) for one in every if nbytes_of(one) <= room)
    found = total(errors, nothing, chosen)
    # The bytes of the last step that was taken back are the most that can be missing.
    steepest = max(
        (max([*own, gone]) - min(own)) / min(NBYTES)
        for own, gone in zip(errors, nothing, strict=True)
    )
    assert best <= found <= best + steepest * NBYTES[-1] + 1e-9
    if room >= NBYTES[-1] * len(errors):
        assert found == pytest.approx(sum(min(own) for own in errors))


def test_of_options_with_the_same_bytes_each_expert_has_its_own_best() -> None:
    errors = [[9.0, 1.0, 5.0, 1.0, 0.0], [9.0, 5.0, 1.0, 1.0, 0.0]]
    menu = Menu.of(NBYTES, errors, [10.0, 10.0])
    assert menu.chosen(6) == [1, 2]
    assert menu.sizes == (0, 2, 3, 5, 8)


def test_more_bytes_that_lose_more_are_not_taken() -> None:
    assert Menu.of(NBYTES, [[4.0, 1.0, 1.0, 2.0, 3.0]], [9.0]).chosen(100) == [1]


def test_what_may_not_be_is_not_taken_and_what_has_to_stay_stays() -> None:
    inf = math.inf
    errors = [[inf, inf, inf, 5.0, 4.0], [9.0, 8.0, 8.0, 1.0, 0.0]]
    menu = Menu.of(NBYTES, errors, [inf, 10.0])
    assert menu.chosen(10) == [3, 3]
    assert menu.chosen(5) == [3, -1]
    assert menu.chosen(4) is None


def test_the_curve_is_never_above_the_best() -> None:
    errors = [[9.0, 4.0, 5.0, 1.0, 0.0], [6.0, 5.0, 1.0, 1.0, 0.0]]
    menu = Menu.of(NBYTES, errors, [10.0, 10.0])
    curve = menu.curve(1, 16)
    for room in range(17):
        chosen = menu.chosen(room) or [-1, -1]
        assert curve[room] <= total(errors, [10.0, 10.0], chosen) + 1e-9 or room < 2
