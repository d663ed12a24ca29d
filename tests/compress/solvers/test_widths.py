"""Who keeps how many neurons: against trying everything, and what must hold of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.compress.solvers.widths import choose, layer_curve
from conmoe_edge.model.anatomy import ExpertPart, ExpertsAnatomy
from conmoe_edge.model.probe import probe
from conmoe_edge.plan.levers import record_bytes
from conmoe_edge.plan.width_levers import alike, steps

Curves = list[tuple[float, ...]]

SIZES = (0, 2, 3, 7)


@st.composite
def falling(draw: st.DrawFn, widths: int = 3, most: int = 4) -> Curves:
    """Errors of a few experts, falling to 0, with ties and flat pieces among them."""
    drops = st.lists(st.integers(0, 6), min_size=widths, max_size=widths)
    return [
        tuple(float(sum(one[place:])) for place in range(widths + 1))
        for one in draw(st.lists(drops, min_size=1, max_size=most))
    ]


@st.composite
def convex(draw: st.DrawFn) -> Curves:
    drops = st.lists(st.integers(0, 9), min_size=3, max_size=3)
    found = draw(st.lists(drops, min_size=1, max_size=4))
    return [
        tuple(float(sum(sorted(one, reverse=True)[place:])) for place in range(4)) for one in found
    ]


def error_of(curves: Curves, chosen: Sequence[int]) -> float:
    return sum(curve[place] for curve, place in zip(curves, chosen, strict=True))


def bytes_of(sizes: Sequence[int], chosen: Sequence[int]) -> int:
    return sum(sizes[place] for place in chosen)


def least_error(curves: Curves, sizes: Sequence[int], room: int, floors: Sequence[int]) -> float:
    """Of all assignments."""
    ranges = [range(floor, len(sizes)) for floor in floors]
    return min(
        error_of(curves, one) for one in itertools.product(*ranges) if bytes_of(sizes, one) <= room
    )


@given(falling(), st.integers(2, 28))
@settings(max_examples=200, deadline=None)
def test_a_choice_is_within_the_room_and_within_a_step_of_the_best(
    curves: Curves, room: int
) -> None:
    chosen = choose(curves, SIZES, room)
    assert any(chosen) and bytes_of(SIZES, chosen) <= room
    best = least_error(curves, SIZES, room, [0] * len(curves))
    found = error_of(curves, chosen)
    assert found >= best
    # The bytes of the last step that was taken back are the most that can be missing.
    steepest = max(
        (curve[a] - curve[b]) / (SIZES[b] - SIZES[a])
        for curve in curves
        for a, b in itertools.combinations(range(4), 2)
    )
    assert found - best <= steepest * SIZES[-1] + 1e-9
    if room >= SIZES[-1] * len(curves):
        assert found == 0.0
    roomier = error_of(curves, choose(curves, SIZES, room + SIZES[-1]))
    assert roomier <= found + 1e-9


@given(convex(), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_equal_steps_of_falling_worth_are_divided_as_well_as_can_be(
    curves: Curves, room: int
) -> None:
    sizes = (0, 1, 2, 3)
    chosen = choose(curves, sizes, room)
    assert error_of(curves, chosen) == least_error(curves, sizes, room, [0] * len(curves))
    assert bytes_of(sizes, chosen) == min(room, 3 * len(curves)), "nothing is left"


@given(falling(), st.integers(2, 28), st.data())
@settings(max_examples=150, deadline=None)
def test_floors_hold_where_there_is_room_for_them(
    curves: Curves, room: int, data: st.DataObject
) -> None:
    floors = data.draw(
        st.lists(st.integers(0, 3), min_size=len(curves), max_size=len(curves)), label="floors"
    )
    chosen = choose(curves, SIZES, room, floors)
    assert any(chosen) and bytes_of(SIZES, chosen) <= room
    if bytes_of(SIZES, floors) <= room:
        assert all(place >= floor for place, floor in zip(chosen, floors, strict=True))
        found = error_of(curves, chosen)
        assert found >= least_error(curves, SIZES, room, floors) - 1e-9
    else:
        assert chosen == choose(curves, SIZES, room)


def test_something_stays_and_ties_go_to_the_first() -> None:
    assert choose([(5.0, 1.0, 0.0), (9.0, 8.0, 0.0)], (0, 4, 8), 1) == [0, 1]
    assert choose([(3.0, 1.0, 0.0)] * 3, (0, 4, 8), 12) == [1, 1, 1]
    assert choose([(2.0, 1.0, 0.0)] * 3, (0, 4, 8), 8) == [2, 0, 0]
    assert choose([(0.0, 0.0, 0.0)] * 2, (0, 4, 8), 4) == [1, 0]


def test_a_step_that_gains_little_alone_is_jumped_over() -> None:
    """The hull: all neurons or none, where half of them are worth nothing."""
    curves = [(8.0, 7.9, 0.0), (6.0, 3.0, 0.0)]
    assert choose(curves, (0, 4, 8), 8) == [2, 0]
    assert choose(curves, (0, 4, 8), 12) == [2, 1]


@given(falling(), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_the_curve_of_a_layer_is_what_the_choices_leave(curves: Curves, unit: int) -> None:
    whole = SIZES[-1] * len(curves)
    units = -(-whole // unit)
    found = layer_curve(curves, SIZES, unit, units)
    assert len(found) == units + 1
    assert found[0] == pytest.approx(sum(curve[0] for curve in curves))
    assert found[-1] == pytest.approx(0.0)
    gains = [a - b for a, b in itertools.pairwise(found)]
    assert all(gain >= -1e-9 for gain in gains)
    inner = gains[: whole // unit]  # the last unit may be a part of one
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(inner))
    for count in range(1, units + 1):
        best = least_error(curves, SIZES, count * unit, [0] * len(curves))
        assert found[count] <= best + 1e-9, "no choice is below the hull"


@given(convex())
@settings(max_examples=100, deadline=None)
def test_the_curve_meets_the_choices_at_its_corners(curves: Curves) -> None:
    sizes = (0, 2, 4, 6)
    found = layer_curve(curves, sizes, 2, 3 * len(curves))
    for count in range(1, 3 * len(curves) + 1):
        assert found[count] == pytest.approx(error_of(curves, choose(curves, sizes, 2 * count)))


# -- which widths there are --------------------------------------------------------------------------------------


def experts_of(width: int, hidden: int, dtype: str = "bfloat16") -> ExpertsAnatomy:
    size = 4 if dtype == "float32" else 2
    parts = (
        ExpertPart("gate_up_proj", (2 * width, hidden), dtype, 2 * size * width * hidden),
        ExpertPart("down_proj", (hidden, width), dtype, size * width * hidden),
    )
    any_experts: Any = probe(tiny_model("qwen3_moe").config).moe_layers[0].experts
    return replace(any_experts, parts=parts)


@pytest.mark.parametrize("precision", ["source", "int8", "int4"])
def test_wide_experts_have_quarters(precision: str) -> None:
    assert steps(experts_of(1024, 2048), precision) == (256, 512, 768, 1024)  # OLMoE
    assert steps(experts_of(768, 2048), precision)[-1] == 768  # Qwen3-30B-A3B


@pytest.mark.parametrize("precision", ["source", "bf16", "int8", "int4", "int8+int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("width", "hidden"), [(1, 8), (7, 8), (16, 32), (48, 32), (96, 192), (512, 128), (1408, 2048)]
)
def test_no_width_is_dear_or_there_twice(
    width: int, hidden: int, dtype: str, precision: str
) -> None:
    experts, kind = experts_of(width, hidden, dtype), precision.rpartition("+")[2]
    found = steps(experts, precision)
    assert found[-1] == width and 1 <= len(found) <= 4
    sizes = [record_bytes(experts.narrowed(one), kind) for one in found]
    for values in (found, sizes):
        assert all(a < b for a, b in itertools.pairwise(values))
    assert all(n <= 1.125 * one * sizes[-1] / width for one, n in zip(found, sizes, strict=True))


def test_records_of_less_than_a_page_have_widths_too() -> None:
    assert steps(experts_of(16, 32), "source") == (4, 8, 12, 16)


def test_widths_are_alike_where_they_must_be() -> None:
    assert alike("source", equal=True) and alike("int8+int4", equal=False)
    assert not alike("source", equal=False) and not alike("int4", equal=False)
