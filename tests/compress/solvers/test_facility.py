"""What stands in for what, at which price, and who stays: against sums over tokens and trying everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conmoe_edge.checkpoint.format.slot_map import NONE
from conmoe_edge.compress.methods.auto import candidates
from conmoe_edge.compress.solvers import slot_errors as slot_errors_module
from conmoe_edge.compress.solvers.facility import (
    assign,
    must_stay,
    select,
    slot_map_of,
    strongest,
    weights_of,
)
from conmoe_edge.compress.solvers.slot_errors import RoutedOutputs, SlotErrors, slot_errors
from conmoe_edge.compress.stats.layer_tokens import LayerTokens

T, H, E, K = 60, 6, 5, 2


def tokens_of(seed: int = 0, unused: int | None = None) -> LayerTokens:
    generator = torch.Generator().manual_seed(seed)
    choice = torch.rand(T, E, generator=generator)
    if unused is not None:
        choice[:, unused] = -1.0
    slots = choice.topk(K).indices
    return LayerTokens(
        torch.randn(T, H, generator=generator), slots, torch.rand(T, K, generator=generator) + 0.1
    )


def linear_experts(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(H, H, generator=generator)
    return [base + 0.5 * torch.randn(H, H, generator=generator) for _ in range(E)]


def brute_pair(tokens: LayerTokens, own: Tensor, other: Tensor, slot: int) -> tuple[float, float]:
    """Scale and error of one pair by sums over single tokens, as the docstring has it."""
    rows, gates = tokens.routed(slot)
    g2 = gates.double().square()
    f, p = (tokens.hidden[rows].double() @ w.double() for w in (own, other))
    mu, nu = (g2 @ f) / g2.sum(), (g2 @ p) / g2.sum()
    inner = norm = plain = 0.0
    for t in range(len(rows)):
        inner += float(g2[t] * torch.dot(f[t] - mu, p[t] - nu))
        norm += float(g2[t] * torch.dot(p[t] - nu, p[t] - nu))
        plain += float(g2[t] * torch.dot(f[t] - mu, f[t] - mu))
    scale = min(1.5, max(0.0, inner / (1.02 * norm)))
    return scale, plain - 2 * scale * inner + scale * scale * norm


def table(error: Tensor, constant: Tensor) -> SlotErrors:
    nobody = RoutedOutputs(torch.zeros(1, E).double(), torch.zeros(E).double(), None)
    return SlotErrors(torch.full((E, E), 0.5).double(), error, constant, nobody)


def test_closed_form_equals_sums_over_tokens() -> None:
    tokens, experts = tokens_of(), linear_experts()
    found = slot_errors(tokens, E, lambda e, x: x @ experts[e])
    for slot in range(E):
        for other in range(E):
            scale, error = brute_pair(tokens, experts[slot], experts[other], slot)
            if slot == other:
                scale, error = 1.0, 0.0
            assert float(found.scale[slot, other]) == pytest.approx(scale, rel=1e-4, abs=1e-5)
            assert float(found.error[slot, other]) == pytest.approx(error, rel=1e-3, abs=1e-3)
    assert bool((found.error <= found.constant.unsqueeze(1) + 1e-9).all()), (
        "never worse than a constant"
    )


def test_a_sketch_measures_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(8)
    wide = [one @ torch.randn(H, 2000, generator=generator) for one in linear_experts()]
    tokens = tokens_of()
    tokens = LayerTokens(tokens.hidden, tokens.slots, tokens.gates)
    right = slot_errors(tokens, E, lambda e, x: x @ wide[e])
    matrix = (
        torch.randn(2000, slot_errors_module.SKETCH, generator=generator)
        / slot_errors_module.SKETCH**0.5
    )
    monkeypatch.setattr(slot_errors_module, "sketch", lambda width: matrix)
    near = slot_errors(tokens, E, lambda e, x: x @ wide[e])
    torch.testing.assert_close(near.constant, right.constant, rtol=0.2, atol=0)
    assert float((near.scale - right.scale).abs().max()) < 0.1
    assert select(near, 3) == select(right, 3)


def test_an_equal_expert_is_free() -> None:
    experts = linear_experts()
    experts[3] = experts[1].clone()
    found = slot_errors(tokens_of(), E, lambda e, x: x @ experts[e])
    assert float(found.error[3, 1]) < 0.01 * float(found.constant[3])
    assert float(found.scale[3, 1]) == pytest.approx(1.0, abs=0.03)


def test_a_slot_that_nobody_chose_gets_what_gives_most_like_it_and_outweighs_nothing() -> None:
    tokens, experts = tokens_of(unused=2), linear_experts()
    experts[2] = 0.5 * experts[4]
    found = slot_errors(tokens, E, lambda e, x: x @ experts[e])
    share = float(tokens.gates.square().mean()) / T
    whole = share * float((tokens.hidden @ experts[2]).square().sum())
    assert float(found.constant[2]) == pytest.approx(whole, rel=1e-4)
    assert float(found.scale[2, 4]) == pytest.approx(0.5 / 1.02, rel=1e-4)
    inner = share * float((tokens.hidden @ experts[2] * (tokens.hidden @ experts[0])).sum())
    norm = share * float((tokens.hidden @ experts[0]).square().sum())
    scale = min(1.5, max(0.0, inner / (1.02 * norm)))
    assert float(found.error[2, 0]) == pytest.approx(
        whole - 2 * scale * inner + scale**2 * norm, rel=1e-3
    )
    others = [e for e in range(E) if e != 2]
    assert float(found.constant[2]) < 0.1 * float(found.constant[others].min())
    assert 2 not in select(found, E - 1)
    mapped = assign(found, (0, 4))
    assert (mapped.targets[2], mapped.scales[2]) == (4, pytest.approx(0.5 / 1.02, rel=1e-4))


def test_energy_by_domain_and_peaks_are_sums_and_maxima_over_tokens() -> None:
    tokens, experts = tokens_of(), linear_experts()
    tokens = replace(tokens, domains=torch.arange(T) % 3)
    found = slot_errors(tokens, E, lambda e, x: x @ experts[e])
    energy = torch.zeros(3, E).double()
    peak = [0.0] * E
    for t in range(T):
        for slot, gate in zip(tokens.slots[t].tolist(), tokens.gates[t].tolist(), strict=True):
            out = tokens.hidden[t] @ experts[slot]
            energy[t % 3, slot] += gate**2 * float(out.square().sum())
            peak[slot] = max(peak[slot], float(out.abs().max()))
    torch.testing.assert_close(found.seen.energy, energy, rtol=1e-4, atol=1e-6)
    assert found.seen.peak.tolist() == pytest.approx(peak, rel=1e-5)


def test_super_experts_and_the_first_of_every_domain_stay() -> None:
    error = torch.ones(E, E).double()
    energy = torch.tensor([[5.0, 1, 1, 1, 1], [1, 1, 1, 1, 5], [5, 1, 1, 1, 4]]).double()
    peak = torch.tensor([1.0, 1.0, 30.0, 1.0, 2.0]).double()
    assert must_stay(energy, peak, 8) == (2, 0, 4)
    assert must_stay(energy, peak, 4) == (2, 0), "half of the places at the most, outliers first"
    assert must_stay(energy, peak, 1) == (2,)
    free = table(error.fill_diagonal_(0.0), torch.ones(E).double())
    assert must_stay(free.seen.energy, free.seen.peak, 4) == ()
    assert select(free, 3, (3, 1)) == (0, 1, 3)
    assert strongest(torch.tensor([1.0, 3, 2, 3, 0]), 3, (4,)) == (1, 3, 4)


@given(st.integers(0, 1000), st.integers(1, E))
@settings(max_examples=25, deadline=None)
def test_selection_takes_the_greatest_gain_each_time(seed: int, keep: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    error = (torch.rand(E, E, generator=generator) * 4).round().double()
    error.fill_diagonal_(0.0)
    constant = (torch.rand(E, generator=generator) * 4).round().double()
    errors = table(error, constant)
    left, chosen = constant.tolist(), []
    for _ in range(keep):
        gains = {
            p: sum(max(0.0, left[e] - float(error[e, p])) for e in range(E))
            for p in range(E)
            if p not in chosen
        }
        best = min(p for p in gains if gains[p] == max(gains.values()))
        chosen.append(best)
        left = [min(left[e], float(error[e, best])) for e in range(E)]
    assert select(errors, keep) == tuple(sorted(chosen))
    mapped = assign(errors, sorted(chosen))
    for slot, (prototype, scale) in enumerate(zip(mapped.targets, mapped.scales, strict=True)):
        if slot in chosen:
            assert (prototype, scale) == (slot, 1.0)
        elif prototype == NONE:
            assert all(float(error[slot, p]) >= float(constant[slot]) for p in chosen)
        else:
            assert float(error[slot, prototype]) == min(float(error[slot, p]) for p in chosen)


def test_merged_weights_equal_a_loop() -> None:
    tokens = tokens_of()
    tokens.slots[0, 0] = E  # a skip mark
    slot_map = slot_map_of(0, (0, 0, 3, 3, NONE), (1.0, 0.5, 2.0, 1.0, 1.0))
    alpha = weights_of(slot_map, tokens.slots, tokens.gates)
    for t in range(T):
        merged = slot_map.merge(tokens.slots[t].tolist(), tokens.gates[t].tolist())
        assert alpha[t].tolist() == pytest.approx([merged.get(0, 0.0), merged.get(3, 0.0)])


@torch.no_grad()
def test_candidates_are_named_once() -> None:
    found = slot_errors(tokens_of(), E, lambda e, x: x @ linear_experts()[e])
    sets = [one.prototypes for one in candidates(found, torch.arange(E).double(), 3)]
    assert len(set(sets)) == len(sets) <= 3
    must = must_stay(found.seen.energy, found.seen.peak, 3)
    assert sets[0] == select(found, 3, must)
    assert strongest(torch.arange(E).double(), 3, must) in sets
    assert all(set(must) <= set(one) for one in sets)
