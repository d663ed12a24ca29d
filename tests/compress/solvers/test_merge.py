"""Aligning and merging experts, against permutations tried one by one and sums in plain loops."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from families import BY_NAME, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conmoe_edge.compress.solvers.merge import (
    aligned,
    alignment,
    likeness,
    neuron_views,
    shares,
    weighted_mean,
)
from conmoe_edge.compress.solvers.neuron_pruning import take_neurons
from conmoe_edge.model.experts import expert_forward, find_experts, part_names

H, WIDTH = 3, 5


class Experts(nn.Module):
    """One expert's layout: with or without gate, halves or interleaved, [out, in] or [in, out]."""

    def __init__(self, gate: bool, concatenated: bool, transposed: bool) -> None:
        super().__init__()
        self.has_gate, self.is_concatenated, self.is_transposed = gate, concatenated, transposed
        self.has_post_expert_norm = False
        self.act_fn = nn.SiLU()

    def _apply_gate(self, value: Tensor) -> Tensor:
        if self.is_concatenated:
            gate, up = value.chunk(2, -1)
        else:
            gate, up = value[..., 0::2], value[..., 1::2]
        return self.act_fn(gate) * up

    def parts(self, seed: int, bias: bool = True) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        name, rows = ("gate_up_proj", 2 * WIDTH) if self.has_gate else ("up_proj", WIDTH)
        shapes = {name: (rows, H), "down_proj": (H, WIDTH)}
        found = {
            key: torch.randn(*reversed(s) if self.is_transposed else s, generator=generator)
            for key, s in shapes.items()
        }
        if bias:
            found[f"{name}_bias"] = torch.randn(rows, generator=generator)
            found["down_proj_bias"] = torch.randn(H, generator=generator)
        return found


LAYOUTS = [
    (gate, concatenated, transposed)
    for gate in (True, False)
    for concatenated in (True, False)
    for transposed in (True, False)
    if gate or concatenated
]


def neuron(module: Experts, parts: dict[str, Tensor], i: int) -> list[float]:
    """gate row, up row, their biases and down column of one neuron, number by number."""
    found: list[float] = []
    name = "gate_up_proj" if module.has_gate else "up_proj"
    at = [i]
    if module.has_gate:
        at = [i, WIDTH + i] if module.is_concatenated else [2 * i, 2 * i + 1]
    for row in at:
        for h in range(H):
            found.append(
                float(parts[name][h, row] if module.is_transposed else parts[name][row, h])
            )
        if f"{name}_bias" in parts:
            found.append(float(parts[f"{name}_bias"][row]))
    for h in range(H):
        down = parts["down_proj"]
        found.append(float(down[i, h] if module.is_transposed else down[h, i]))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_likeness_and_alignment_equal_trying_everything(
    layout: tuple[bool, bool, bool], bias: bool
) -> None:
    module = Experts(*layout)
    one, other = module.parts(1, bias), module.parts(2, bias)
    assert {len(view) for view in neuron_views(module, one)} == {WIDTH}
    inner = [
        [
            sum(
                a * b for a, b in zip(neuron(module, one, i), neuron(module, other, j), strict=True)
            )
            for j in range(WIDTH)
        ]
        for i in range(WIDTH)
    ]
    torch.testing.assert_close(
        likeness(module, one, other), torch.tensor(inner), rtol=1e-4, atol=1e-5
    )
    best = max(permutations(range(WIDTH)), key=lambda p: sum(inner[i][p[i]] for i in range(WIDTH)))
    assert alignment(module, one, other).tolist() == list(best)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_aligned_expert_is_the_same_function(layout: tuple[bool, bool, bool]) -> None:
    module = Experts(*layout)
    one, other = module.parts(1), module.parts(2)
    hidden = torch.randn(7, H)
    moved = aligned(module, one, other)
    torch.testing.assert_close(
        expert_forward(module, hidden, moved), expert_forward(module, hidden, other)
    )
    own = aligned(module, one, one)
    assert all(torch.equal(own[name], one[name]) for name in one)


@given(st.integers(0, 500), st.permutations(range(WIDTH)), st.sampled_from(LAYOUTS))
@settings(max_examples=40, deadline=None)
def test_equal_experts_in_another_order_merge_to_themselves(
    seed: int, order: list[int], layout: tuple[bool, bool, bool]
) -> None:
    module = Experts(*layout)
    one = module.parts(seed)
    other = take_neurons(module, one, torch.tensor(order))
    merged = weighted_mean([one, aligned(module, one, other)], [3, 7])
    assert all(torch.equal(merged[name], one[name]) for name in one)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_family_has_neurons_that_can_be_ordered(name: str) -> None:
    """Experts of real modules: shuffled ones are put back, whatever way gate and up are fused."""
    module = next(iter(find_experts(tiny_model(name)).values()))[1]
    parts = {n: getattr(module, n)[1].detach() for n in part_names(module)}
    width = parts["down_proj"].shape[0 if module.is_transposed else 1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(3))
    back = aligned(module, parts, take_neurons(module, parts, order))
    assert all(torch.equal(back[key], part) for key, part in parts.items())


def test_the_mean_is_weighted_by_usage() -> None:
    members = [{"w": torch.randn(2, 3, dtype=torch.bfloat16)} for _ in range(3)]
    usage = [5, 0, 3]
    found = weighted_mean(members, usage)["w"]
    for r in range(2):
        for c in range(3):
            total = sum(
                float(m["w"][r, c]) * n / sum(usage) for m, n in zip(members, usage, strict=True)
            )
            assert float(found[r, c]) == pytest.approx(total, rel=1e-6, abs=1e-7)
    assert found.dtype == torch.float32


def test_unused_groups_are_averaged_equally_and_nonsense_is_refused() -> None:
    assert shares([0, 0, 0, 0]) == [0.25] * 4
    equal = weighted_mean([{"w": torch.ones(2)}, {"w": torch.zeros(2)}], [0, 0])
    assert equal["w"].tolist() == [0.5, 0.5]
    for wrong in ([], [-1.0, 2.0], [float("nan")]):
        with pytest.raises(ValueError, match="usage"):
            shares(wrong)
