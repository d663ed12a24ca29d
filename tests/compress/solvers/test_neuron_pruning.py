"""Which neurons stay and what a cut costs: against plain least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import tiny_model
from torch import Tensor

from conmoe_edge.compress.solvers.neuron_pruning import corrected, cuts, surviving, take_neurons
from conmoe_edge.model.experts import expert_forward, find_experts, part_names

N, WIDTH, H = 400, 8, 6
RIDGE = 1e-6


def test_a_neuron_that_another_repeats_goes_first_and_is_made_up_for() -> None:
    generator = torch.Generator().manual_seed(3)
    activations = torch.randn(400, 8, generator=generator)
    activations[:, 5] = activations[:, 2]
    down = torch.randn(H, 8, generator=generator)
    alive, weight = surviving(activations.T @ activations, down, 7)
    assert len(alive) == 7 and (2 not in alive or 5 not in alive)
    off = activations[:, alive] @ weight.T - activations @ down.T
    assert float(off.norm()) < 0.02 * float((activations @ down.T).norm())


def test_the_cost_of_a_neuron_is_what_least_squares_says() -> None:
    generator = torch.Generator().manual_seed(4)
    mixed = torch.randn(8, 8, generator=generator) * 0.6 + torch.eye(8)
    activations = torch.randn(500, 8, generator=generator) @ mixed
    down = torch.randn(H, 8, generator=generator)
    costs = []
    for gone in range(8):
        stay = [j for j in range(8) if j != gone]
        solved = torch.linalg.lstsq(activations[:, stay], activations @ down.T).solution
        costs.append(float((activations[:, stay] @ solved - activations @ down.T).square().sum()))
    alive, _ = surviving(activations.T @ activations, down, 7)
    assert sorted(set(range(8)) - set(alive.tolist())) == [costs.index(min(costs))]


def test_nothing_is_cut_where_all_may_stay_and_nobody_came_is_no_error() -> None:
    down = torch.randn(H, 8)
    alive, weight = surviving(torch.eye(8), down, 8)
    assert alive.tolist() == list(range(8)) and torch.equal(weight.float(), down)
    alive, weight = surviving(torch.zeros(8, 8), down, 3)
    assert len(alive) == 3 and torch.equal(weight.float(), down[:, alive])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_a_narrow_expert_is_the_whole_one_without_some_neurons(name: str) -> None:
    model = tiny_model(name)
    _, module = next(iter(find_experts(model).values()))
    parts = {n: getattr(module, n)[1].detach().clone() for n in part_names(module)}
    axis = 0 if module.is_transposed else 1
    neurons = torch.tensor([0, 3, 4, 9])
    hidden = torch.randn(7, model.config.hidden_size)
    with torch.no_grad():
        narrow = expert_forward(module, hidden, take_neurons(module, parts, neurons))
        gone = torch.ones(parts["down_proj"].shape[axis], dtype=torch.bool)
        gone[neurons] = False
        if axis == 0:
            parts["down_proj"][gone] = 0.0
        else:
            parts["down_proj"][:, gone] = 0.0
        torch.testing.assert_close(narrow, expert_forward(module, hidden, parts))


def samples(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated activations [N, WIDTH] and a down projection [H, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(WIDTH, WIDTH, generator=generator) * 0.5 + torch.eye(WIDTH)
    down = torch.randn(H, WIDTH, generator=generator)
    return torch.randn(N, WIDTH, generator=generator) @ mixed, down


def left_of(activations: Tensor, down: Tensor, neurons: Tensor) -> float:
    """The squared error of the best correction of the others, by least squares over tokens."""
    target = activations.double() @ down.double().T
    kept = activations.double()[:, neurons]
    return float((target - kept @ torch.linalg.lstsq(kept, target).solution).square().sum())


def test_what_a_cut_costs_is_what_least_squares_leaves() -> None:
    values, down = samples()
    found = cuts(values.T @ values, down, range(1, WIDTH + 1), RIDGE)
    for width, cut in zip(range(1, WIDTH + 1), found, strict=True):
        assert len(cut.neurons) == width
        assert torch.equal(cut.neurons, cut.neurons.unique())
        assert cut.error == pytest.approx(left_of(values, down, cut.neurons), rel=1e-3, abs=0.01)
    assert found[-1].error == 0.0
    for narrow, wide in itertools.pairwise(found):
        assert set(narrow.neurons.tolist()) < set(wide.neurons.tolist())
        assert narrow.error >= wide.error


def test_a_whole_block_that_goes_in_one_round_costs_its_least_squares() -> None:
    """64 neurons in rounds of eight: the sum over rounds is the error of the whole correction."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(900, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    down = torch.randn(H, 64, generator=generator)
    (half, quarter) = reversed(cuts(values.T @ values, down, (16, 32), RIDGE))
    for cut in (half, quarter):
        assert cut.error == pytest.approx(left_of(values, down, cut.neurons), rel=0.01)


def test_one_neuron_that_goes_is_the_cheapest_of_all() -> None:
    values, down = samples(2)
    costs = [
        left_of(values, down, torch.tensor([j for j in range(WIDTH) if j != gone]))
        for gone in range(WIDTH)
    ]
    (cut,) = cuts(values.T @ values, down, (WIDTH - 1,), RIDGE)
    assert set(range(WIDTH)) - set(cut.neurons.tolist()) == {costs.index(min(costs))}
    assert cut.error == pytest.approx(min(costs), rel=1e-3)


def test_nobody_came_is_no_error_and_the_largest_columns_stay() -> None:
    _, down = samples()
    order = down.square().sum(0).argsort(descending=True)
    for cut, width in zip(cuts(torch.zeros(WIDTH, WIDTH), down, (2, 5)), (2, 5), strict=True):
        assert cut.error == 0.0 and cut.neurons.tolist() == sorted(order[:width].tolist())
    assert torch.equal(
        corrected(torch.zeros(WIDTH, WIDTH), down, torch.tensor([1, 4])), down[:, [1, 4]]
    )


def test_a_correction_is_ridge_regression() -> None:
    """Rows of sqrt(ridge) on every neuron, that of those which go included, hold the correction where it was."""
    values, down = samples(3)
    neurons = torch.tensor([0, 2, 3, 7])
    ridge = 0.01 * float((values.T @ values).diagonal().mean())
    held = torch.cat([values, torch.eye(WIDTH) * ridge**0.5]).double()
    wanted = torch.linalg.lstsq(held[:, neurons], held @ down.double().T).solution.T
    found = corrected(values.T @ values, down, neurons)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(corrected(values.T @ values, down, torch.arange(WIDTH)), down)
