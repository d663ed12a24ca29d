"""Rounding with error feedback, beside plain loops over the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.low_bits import Grid
from conmoe_edge.compress.solvers.error_feedback import damped, round_with_feedback

STEP = 0.25


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(matrices: int, columns: int, tokens: int) -> Tensor:
    """Of inputs whose columns go together and are of different sizes."""
    mixed = drawn(columns, columns, seed=1) * 0.3 + torch.eye(columns)
    inputs = drawn(matrices, tokens, columns, seed=2) * torch.linspace(0.2, 2, columns) @ mixed
    return inputs.mT @ inputs


def to_steps(_group: Tensor, _counts: Tensor):
    return lambda columns: (columns / STEP).round() * STEP


def by_plain_loops(weight: Tensor, moment: Tensor) -> Tensor:
    """One matrix, column by column: what is left is solved again each time (Frantar et al., equation 2)."""
    left, found = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    inverse = torch.linalg.inv(moment.double())
    for c in range(weight.shape[1]):
        found[:, c] = (left[:, c] / STEP).round() * STEP
        error = (left[:, c] - found[:, c]) / inverse[c, c]
        left = left - error[:, None] * inverse[c]
        inverse = inverse - inverse[:, c : c + 1] @ inverse[c : c + 1] / inverse[c, c]
    return found.float()


@pytest.mark.parametrize("group", [8, 32])
def test_as_the_formula_has_it(group: int) -> None:
    weight, moment = drawn(3, 10, 32), damped(moments(3, 32, 200))
    found = round_with_feedback(weight, moment, group, to_steps)
    wanted = torch.stack([by_plain_loops(*pair) for pair in zip(weight, moment, strict=True)])
    # In fp32 a number may fall to the other side where it lies between two.
    assert float((found != wanted).float().mean()) < 0.01


def lost(weight: Tensor, found: Tensor, moment: Tensor) -> Tensor:
    apart = weight - found
    return ((apart @ moment) * apart).sum((1, 2))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_it_loses_less_than_rounding(bits: int) -> None:
    weight, moment = drawn(4, 64, 96), moments(4, 96, 400)
    grid = Grid.over(weight, bits)

    def round_group(group: Tensor, counts: Tensor):
        s, z = grid.fit(group, counts)
        return lambda columns: grid.values(grid.codes(columns, s, z), s, z)

    found = round_with_feedback(weight, damped(moment), 32, round_group)
    grouped = weight.unflatten(2, (3, 32))
    alone = [
        round_group(grouped[:, :, g], torch.ones(4, 1, 32))(grouped[:, :, g]) for g in range(3)
    ]
    rounded = torch.stack(alone, 2).flatten(2)
    assert bool((lost(weight, found, moment) < 0.7 * lost(weight, rounded, moment)).all())


def test_without_correlations_it_is_rounding() -> None:
    weight = drawn(2, 8, 32)
    moment = torch.eye(32).expand(2, 32, 32) * 3.0
    found = round_with_feedback(weight, moment.contiguous(), 32, to_steps)
    assert torch.equal(found, to_steps(weight, weight)(weight))


def test_experts_that_nothing_came_to_can_be_factored() -> None:
    """Their errors follow those of the others; where there are no others, every rounding is as good."""
    seen = moments(2, 32, 100)
    seen[1] = 0.0
    weight = drawn(2, 8, 32)
    for moment in (damped(seen), damped(torch.zeros(2, 32, 32))):
        assert bool(round_with_feedback(weight, moment, 32, to_steps).isfinite().all())


def test_its_weights_are_not_changed() -> None:
    weight, moment = drawn(1, 8, 32), damped(moments(1, 32, 100))
    before = weight.clone(), moment.clone()
    round_with_feedback(weight, moment, 32, to_steps)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])
