"""How prototypes are divided between layers: against trying everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.compress.solvers.layer_budgets import LayerWorth, between, share_out

E = 5


@given(st.integers(0, 500), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_budgets_are_the_best_there_are(seed: int, uniform: int) -> None:
    """Against trying everything: three layers of five experts, at least half of the uniform number each."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(3):
        steps = torch.rand(E, generator=generator).sort(descending=True).values.tolist()
        curve = [sum(steps[k:]) for k in range(E + 1)]
        layers.append(LayerWorth(tuple(curve), float(torch.rand(1, generator=generator))))

    def cost(counts: tuple[int, ...]) -> float:
        return sum(
            one.divergence * one.curve[count] / one.curve[uniform]
            for one, count in zip(layers, counts, strict=True)
        )

    floor = max(1, uniform // 2)
    possible = [
        (a, b, c)
        for a in range(floor, E + 1)
        for b in range(floor, E + 1)
        for c in range(floor, E + 1)
        if a + b + c == 3 * uniform
    ]
    found = share_out(layers, uniform)
    assert sum(found) == 3 * uniform and min(found) >= floor and max(found) <= E
    assert cost(tuple(found)) == pytest.approx(min(map(cost, possible)))


def test_half_way_between_two_divisions_keeps_the_sum() -> None:
    assert between([4, 4, 4, 4], [1, 6, 3, 6]) == [3, 5, 3, 5]
    assert between([4, 4], [4, 4]) == [4, 4]


@given(st.lists(st.tuples(st.integers(1, 32), st.integers(1, 32)), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_half_way_lies_between(pairs: list[tuple[int, int]]) -> None:
    first = [a for a, _ in pairs]
    second = [b for _, b in pairs]
    second[-1] += sum(first) - sum(second)
    found = between(first, second)
    assert sum(found) == sum(first)
    assert all(
        min(a, b) <= one <= max(a, b) for a, b, one in zip(first, second, found, strict=True)
    )


def test_layers_that_are_worth_nothing_or_lose_nothing_break_nothing() -> None:
    flat = LayerWorth((0.0,) * (E + 1), 0.0)
    assert sum(share_out([flat, flat], 3)) == 6
    dear = LayerWorth(tuple(float(E - k) for k in range(E + 1)), 1.0)
    assert share_out([flat, dear], 3) == [1, 5]
