"""MergeMoE against a transcription of the paper with its pseudo-inverse, and what must hold of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import save_tiny, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from scopes import (
    LAYOUTS,
    count_of,
    layer_outputs,
    module_of,
    parts_of,
    scope_of,
    tokens_for,
)
from torch import Tensor

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.compress.methods import METHODS, mergemoe
from conmoe_edge.compress.solvers.least_squares import LeastSquares
from conmoe_edge.compress.solvers.merge import weighted_mean
from conmoe_edge.errors import UsageError
from conmoe_edge.model.experts import expert_forward, inner_activations, part_names

METHOD = METHODS["mergemoe"]
FITTED = [layout for layout in LAYOUTS if layout != "norm"]


def input_weights(module, expert: int) -> Tensor:
    """[W_up; W_gate] of one expert as one row of numbers."""
    parts = parts_of(module, expert)
    whole = parts["gate_up_proj" if module.has_gate else "up_proj"].double()
    whole = whole.T if module.is_transposed else whole
    if module.has_gate:
        half = len(whole) // 2
        gate, up = (
            (whole[:half], whole[half:]) if module.is_concatenated else (whole[0::2], whole[1::2])
        )
        whole = torch.cat([up, gate])
    return whole.reshape(-1)


def plain_groups(module, counts: list[int], keep: int) -> dict[int, list[int]]:
    """Section 4, summary, step 1: the most used are centres, the others go to the most alike."""
    order = sorted(range(len(counts)), key=lambda e: (-counts[e], e))
    centres = sorted(order[:keep])
    groups = {centre: [centre] for centre in centres}
    for expert in sorted(order[keep:]):
        own = input_weights(module, expert)

        def cosine(centre: int, own: Tensor = own) -> float:
            other = input_weights(module, centre)
            return float(own @ other / (own.norm() * other.norm()))

        groups[max(centres, key=lambda centre: (cosine(centre), -centre))].append(expert)
    return {centre: sorted(members) for centre, members in groups.items()}


def plain_down(module, members: list[int], shares: list[float], hidden: Tensor) -> Tensor:
    """W'_D T1 with T1 = Q P^+, section 4, equation 6; [H, I] in fp64."""
    wide = {n: getattr(module, n).detach().double() for n in part_names(module)}
    averaged = {
        n: sum(part[one] * share for one, share in zip(members, shares, strict=True))
        for n, part in wide.items()
    }

    def inner(parts) -> Tensor:
        return inner_activations(module, hidden.double(), parts).T  # [I, n]

    p = inner(averaged)
    q = torch.cat([inner({n: part[one] for n, part in wide.items()}) for one in members])
    stacked = [
        share * (wide["down_proj"][one].T if module.is_transposed else wide["down_proj"][one])
        for one, share in zip(members, shares, strict=True)
    ]
    return torch.cat(stacked, 1) @ (q @ torch.linalg.pinv(p))


@pytest.mark.parametrize("layout", FITTED)
def test_decision_equals_the_paper(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mergemoe, "RIDGE", 0.0)
    monkeypatch.setattr(mergemoe, "_CHUNK", 64)
    monkeypatch.setattr(mergemoe, "_BLOCK_BYTES", 4096)
    module = module_of(layout)
    tokens = tokens_for(module, 400)
    scope = scope_of({3: (module, tokens)})
    counts = list(scope.layers[0].statistics.counts)
    decision = METHOD.decide(scope, 3)
    groups = plain_groups(module, counts, 3)
    assert decision.prototypes == tuple(ExpertId(3, centre) for centre in groups)
    for centre, members in groups.items():
        assert all(decision.slots[one].prototype == ExpertId(3, centre) for one in members)
    assert any(len(members) > 1 for members in groups.values()) and decision.parts is not None
    for centre, members in groups.items():
        found = decision.parts(ExpertId(3, centre))
        if len(members) == 1:
            assert all(torch.equal(found[n], parts_of(module, centre)[n]) for n in found)
            continue
        total = sum(counts[one] for one in members)
        shares = [counts[one] / total for one in members]
        rows = [t for t in range(400) if set(tokens.slots[t].tolist()) & set(members)]
        down = plain_down(module, members, shares, tokens.hidden[rows])
        wanted = down.T if module.is_transposed else down
        torch.testing.assert_close(found["down_proj"].double(), wanted, rtol=2e-3, atol=2e-4)
        for name in set(found) - {"down_proj"}:
            average = sum(
                parts_of(module, one)[name].double() * share
                for one, share in zip(members, shares, strict=True)
            )
            torch.testing.assert_close(found[name].double(), average, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", FITTED)
def test_the_fit_brings_the_merged_expert_closer_to_the_mixture(layout: str) -> None:
    module = module_of(layout)
    tokens = tokens_for(module, 400)
    members, shares = [1, 4, 6], [0.5, 0.3, 0.2]
    scope = scope_of({0: (module, tokens)})
    whole = [parts_of(module, one) for one in members]
    mean = weighted_mean(whole, shares)
    with torch.no_grad():
        fitted = {
            **mean,
            "down_proj": mergemoe.fitted_down(scope, whole, shares, mean, tokens.hidden),
        }
        mixture = sum(
            expert_forward(module, tokens.hidden, parts) * share
            for parts, share in zip(whole, shares, strict=True)
        )
        off = {
            name: float((expert_forward(module, tokens.hidden, parts) - mixture).square().sum())
            for name, parts in (("mean", mean), ("fitted", fitted))
        }
    assert off["fitted"] < 0.95 * off["mean"]


@given(st.integers(0, 300), st.integers(1, 12), st.floats(1e-4, 1.0))
@settings(max_examples=40, deadline=None)
def test_the_ridge_is_least_squares_with_a_row_for_each_feature(
    seed: int, rows: int, ridge: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 5, generator=generator).double()
    wanted = torch.randn(rows, 3, generator=generator).double()
    system = LeastSquares(5, 3)
    cut = rows // 2
    for span in (slice(0, cut), slice(cut, rows)):
        system.add(features[span], wanted[span])
    weight = ridge * float(features.square().sum() / 5)
    more = torch.cat([features, torch.eye(5).double() * weight**0.5])
    target = torch.cat([wanted, torch.zeros(5, 3).double()])
    found = torch.linalg.lstsq(more, target).solution.T
    torch.testing.assert_close(system.solve(ridge), found, rtol=1e-7, atol=1e-8)


def test_features_that_were_never_on_give_zeros() -> None:
    system = LeastSquares(4, 2)
    assert torch.equal(system.solve(1e-3), torch.zeros(2, 4).double())
    system.add(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.ones(1, 2))
    found = system.solve(1e-3)
    assert bool(found.isfinite().all()) and bool((found[:, 1:] == 0).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merging_equal_experts_is_exact(layout: str) -> None:
    module = module_of(layout)
    tokens = tokens_for(module, 400)
    rarest = int(torch.bincount(tokens.slots.flatten(), minlength=9)[: count_of(module)].argmin())
    with torch.no_grad():
        for name in part_names(module):
            getattr(module, name)[rarest] = getattr(module, name)[2]
    scope = scope_of({1: (module, tokens)})
    decision = METHOD.decide(scope, count_of(module) - 1)
    assert decision.slots[rarest].prototype == ExpertId(1, 2) and decision.parts is not None
    for name in decision.prototypes:
        wanted = parts_of(module, name.expert)
        for key, part in decision.parts(name).items():
            torch.testing.assert_close(part, wanted[key], rtol=0, atol=1e-5)
    before, after = layer_outputs(scope, decision)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_nothing_is_changed_where_all_are_kept() -> None:
    module = module_of("qwen3_moe")
    scope = scope_of({0: (module, tokens_for(module))})
    decision = METHOD.decide(scope, count_of(module))
    assert decision.parts is None and decision.prototypes == scope.pool
    assert tuple(slot.prototype for slot in decision.slots) == scope.pool


@pytest.mark.parametrize("layout", ["granitemoe", "gpt_oss"])
def test_too_few_tokens_take_the_average_and_say_so(layout: str) -> None:
    module = module_of(layout)
    needed = 4 * module.down_proj.shape[1 if module.is_transposed else 2]
    for count, enough in ((needed - 1, False), (needed, True)):
        tokens = tokens_for(module, count)
        tokens.slots[0, 0] = 0
        scope = scope_of({7: (module, tokens)})
        decision = METHOD.decide(scope, 1)  # all tokens come to the one cluster
        assert decision.parts is not None
        found = decision.parts(decision.prototypes[0])
        average = weighted_mean(
            [parts_of(module, one) for one in range(count_of(module))],
            scope.layers[0].statistics.counts,
        )
        assert torch.equal(found["down_proj"], average["down_proj"]) != enough
        rest = set(found) - {"down_proj"}
        assert all(torch.equal(found[name], average[name]) for name in rest)
        said = (
            f"Layer 7: fewer than {needed} calibration tokens came to 1 of 1 merged experts; their "
            "down projections are averaged and not fitted. --calibration-tokens takes more.",
        )
        assert decision.notes == (() if enough else said)


def test_behind_a_norm_the_average_stays() -> None:
    module = module_of("norm")
    scope = scope_of({0: (module, tokens_for(module, 400))})
    decision = METHOD.decide(scope, 3)
    assert decision.parts is not None and len(decision.notes) == 1 and "norm" in decision.notes[0]
    counts = scope.layers[0].statistics.counts
    for name in decision.prototypes:
        members = [i for i, slot in enumerate(decision.slots) if slot.prototype == name]
        average = weighted_mean(
            [parts_of(module, one) for one in members], [counts[one] for one in members]
        )
        found = decision.parts(name)
        assert all(torch.equal(found[key], average[key]) for key in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_that_nobody_chose_break_nothing(layout: str) -> None:
    module = module_of(layout)
    scope = scope_of({2: (module, tokens_for(module, 400, unused=(1, 3, 6, 7)))})
    for keep in (1, 3, 6):
        decision = METHOD.decide(scope, keep)
        assert decision.parts is not None
        for name in decision.prototypes:
            assert all(bool(part.isfinite().all()) for part in decision.parts(name).values())
        before, after = layer_outputs(scope, decision)
        assert bool(after.isfinite().all())
        if keep >= 4:  # nobody goes where an unused expert was averaged in
            used = [e for e in range(8) if e not in (1, 3, 6, 7)]
            assert all(decision.slots[e].prototype == ExpertId(2, e) for e in used)
            torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)


def test_scopes_of_several_layers_are_refused(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "source", mlp_only_layers=[])
    save_tokenizer(source)
    with pytest.raises(UsageError, match="within a layer") as refusal:
        api.fit(str(source), tmp_path / "out", budget="4GB", rate=0.5, scope=2, method="mergemoe")
    assert "--scope 1" in str(refusal.value.fix)
    assert not (tmp_path / "out").exists()
