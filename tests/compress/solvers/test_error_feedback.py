"""Rounding with error feedback, beside plain loops over the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.compress.solvers.error_feedback import Grid, Inputs, damped, round_with_feedback
from conmoe_edge.compress.solvers.rounding import FED_BACK, round_matrices, round_matrix

STEP = 0.25


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(matrices: int, columns: int, tokens: int, seed: int = 2) -> Tensor:
    """Of columns that go together and are of different sizes."""
    mixed = drawn(columns, columns, seed=1) * 0.3 + torch.eye(columns)
    return drawn(matrices, tokens, columns, seed=seed) * torch.linspace(0.2, 2, columns) @ mixed


def moments(matrices: int, columns: int, tokens: int) -> Tensor:
    seen = inputs(matrices, columns, tokens)
    return seen.mT @ seen


class Steps:
    """Multiples of ``STEP``."""

    low, top = -100.0, 200

    def __init__(self, group: int) -> None:
        self.group = group
        self.asked: list[Tensor] = []

    def fit(self, columns: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        assert columns.shape[1] == counts.shape[1]
        self.asked.append(counts)
        step = torch.full_like(columns[:, :1], STEP)
        return step, torch.zeros_like(step)


def rounded(weight: Tensor, moment: Tensor, group: int) -> tuple[Tensor, Grid, Tensor]:
    grid = Steps(group)
    found = round_with_feedback(weight, Inputs(moment), grid)
    return (found.codes.mT.to(weight.dtype) + grid.low) * STEP, grid, found.groups


def by_plain_loops(weight: Tensor, moment: Tensor, group: int) -> Tensor:
    """One matrix: the group that most comes in by, its column that most comes in by, and so on; the columns that are
    left are solved again each time (Frantar et al., equation 2).
    """
    left, size = weight.clone(), moment.diagonal()
    starts = sorted(range(0, len(size), group), key=lambda at: -float(size[at : at + group].sum()))
    rest = list(range(len(size)))
    for start in starts:
        for c in sorted(range(start, start + group), key=lambda c: -float(size[c])):
            rest.remove(c)
            found = (left[:, c] / STEP).round() * STEP
            change, left[:, c] = found - left[:, c], found
            if rest:
                left[:, rest] -= torch.outer(
                    change, torch.linalg.solve(moment[rest][:, rest], moment[rest, c])
                )
    return left


@pytest.mark.parametrize("group", [8, 32, 96])
def test_as_the_formula_has_it(group: int) -> None:
    weight, moment = drawn(2, 10, 96).double(), damped(moments(2, 96, 300)).double()
    found, _, _ = rounded(weight, moment, group)
    for one, other, own in zip(found, weight, moment, strict=True):
        assert torch.equal(one, by_plain_loops(other, own, group))


def test_groups_are_asked_for_in_the_order_that_is_told() -> None:
    moment = damped(moments(2, 96, 300))
    _, grid, groups = rounded(drawn(2, 10, 96), moment, 32)
    assert len(grid.asked) == 3  # type: ignore[attr-defined]
    size = moment.diagonal(dim1=1, dim2=2).unflatten(1, (3, 32)).sum(2)
    assert torch.equal(groups, size.argsort(dim=1, descending=True))


def lost(weight: Tensor, found: Tensor, moment: Tensor) -> Tensor:
    apart = weight - found
    return ((apart @ moment) * apart).sum((1, 2))


@pytest.mark.parametrize(
    ("kind", "most"), [("int8", 0.8), ("int4", 0.75), ("q4", 0.75), ("q3", 0.75), ("q2", 0.75)]
)
def test_it_loses_less_than_rounding_on_tokens_that_it_has_not_seen(
    kind: Kind, most: float
) -> None:
    weight = drawn(4, 64, 96)
    seen = inputs(4, 96, 800, seed=5)
    unseen = seen.mT @ seen
    found = torch.stack(
        [one.dequantise() for one in round_matrices(weight, moments(4, 96, 800), kind)]
    )
    plain = torch.stack([quantise(one, kind).dequantise() for one in weight])
    assert bool((lost(weight, found, unseen) < most * lost(weight, plain, unseen)).all())


@pytest.mark.parametrize("kind", sorted(FED_BACK))
def test_matrices_together_are_what_they_are_alone(kind: Kind) -> None:
    weight, moment = drawn(3, 64, 64), moments(3, 64, 200)
    for place, matrix in enumerate(round_matrices(weight, moment, kind)):
        alone = round_matrix(weight[place], moment[place], kind)
        assert (alone.kind, alone.rows, alone.columns) == (kind, 64, 64)
        assert torch.equal(alone.values, matrix.values)
        assert alone.scales is not None and matrix.scales is not None
        assert torch.equal(alone.scales, matrix.scales)


def test_int8_takes_columns_that_fill_no_group() -> None:
    weight, moment = drawn(1, 24, 70), moments(1, 70, 300)
    (matrix,) = round_matrices(weight, moment, "int8")
    assert float((matrix.dequantise() - weight[0]).abs().max()) < 0.1


def test_without_correlations_it_is_rounding() -> None:
    weight = drawn(2, 8, 32)
    moment = (torch.eye(32) * 3.0).expand(2, 32, 32).contiguous()
    found, _, _ = rounded(weight, moment, 32)
    assert torch.equal(found, (weight / STEP).round() * STEP)


@pytest.mark.parametrize("tokens", [0, 3])
def test_experts_that_few_came_to_follow_the_others(tokens: int) -> None:
    """Where there are no others, every rounding is as good."""
    seen = moments(2, 32, 400)
    few = inputs(1, 32, tokens, seed=9)[0]
    balanced = torch.stack([seen[0], few.T @ few])
    weight = drawn(2, 64, 32)
    found = round_matrices(weight, balanced, "q3", seen[0])
    alone = round_matrices(weight, balanced, "q3")
    off = [
        float(lost(weight[1:], one[1].dequantise().unsqueeze(0), seen[:1]))
        for one in (found, alone)
    ]
    assert off[0] < 0.7 * off[1]
    (nothing,) = round_matrices(weight[:1], torch.zeros(1, 32, 32), "q3")
    assert bool(nothing.dequantise().isfinite().all())


def test_a_matrix_that_fp32_cannot_factor_is_factored_in_fp64() -> None:
    """Whole numbers of low rank and a ridge that fp32 just holds."""
    seen = drawn(1, 20, 64).sign()
    moment = seen.mT @ seen
    moment.diagonal(dim1=1, dim2=2).add_(2.0**-19)
    assert int(torch.linalg.cholesky_ex(moment.flip(1, 2))[1].max()) > 0, "it would have done"
    found, _, _ = rounded(drawn(1, 8, 64), moment, 32)
    assert bool(found.isfinite().all())


def test_its_weights_are_not_changed() -> None:
    weight, moment = drawn(1, 8, 32), damped(moments(1, 32, 100))
    before = weight.clone(), moment.clone()
    rounded(weight, moment, 32)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])
