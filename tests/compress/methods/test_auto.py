"""``auto`` step by step against plain transcriptions, and what must hold of each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, save_tokenizer, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest
from conmoe_edge.checkpoint.format.slot_map import NONE
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.compress.methods import auto as auto_module
from conmoe_edge.compress.methods.auto import AUTO, candidates
from conmoe_edge.compress.methods.interface import LayerView, ScopeView
from conmoe_edge.compress.methods.rebuild import StandIns, error_on, rebuild
from conmoe_edge.compress.phases import survey as survey_module
from conmoe_edge.compress.solvers import refit as refit_module
from conmoe_edge.compress.solvers import slot_errors as slot_errors_module
from conmoe_edge.compress.solvers.facility import (
    assign,
    must_stay,
    select,
    slot_map_of,
    strongest,
    weights_of,
)
from conmoe_edge.compress.solvers.layer_budgets import LayerWorth, between, share_out
from conmoe_edge.compress.solvers.neuron_pruning import surviving, take_neurons
from conmoe_edge.compress.solvers.refit import Features, refit
from conmoe_edge.compress.solvers.slot_errors import RoutedOutputs, SlotErrors, slot_errors
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stats.statistics import StatisticsTracker
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.expert_hooks import MappedTap
from conmoe_edge.compress.stream.scope_weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.errors import UsageError
from conmoe_edge.model.anatomy import ExpertPart, ExpertsAnatomy, ModelAnatomy
from conmoe_edge.model.experts import expert_forward, find_experts, part_names
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.advice import measured
from conmoe_edge.plan.levers import kept, record_bytes
from conmoe_edge.plan.width_levers import PARTS, narrow_width, pool_kept, steps, trimmed

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


def of_values(rows: Tensor, values: Tensor) -> Features:
    return Features(rows, values, values.T @ values)


def test_refit_solves_block_after_block() -> None:
    """Against plain least squares: each block alone, the others where they are, in order, the constants last."""
    generator = torch.Generator().manual_seed(5)
    whole = torch.randn(T, 8, generator=generator)
    rows = [torch.arange(0, 45), torch.arange(20, T)]
    features = [of_values(r, whole[r][:, i * 4 : i * 4 + 4]) for i, r in enumerate(rows)]
    down = [torch.randn(H, 4, generator=generator) for _ in rows]
    gates = torch.rand(T, E, generator=generator)
    target = torch.randn(T, H, generator=generator)

    joint = torch.zeros(T, 8 + E, dtype=torch.float64)
    for i, one in enumerate(features):
        joint[one.rows, i * 4 : i * 4 + 4] = one.values.double()
    joint[:, 8:] = gates
    start = torch.cat([torch.cat(down, 1).T, torch.zeros(E, H)]).double()
    ridge = torch.zeros(8 + E, dtype=torch.float64)
    ridge[:8] = refit_module.PRIOR * joint[:, :8].square().sum() / sum(map(len, rows))
    ridge[8:] = refit_module.PRIOR * joint[:, 8:].square().sum() / T

    def objective(x: Tensor) -> float:
        moved = (ridge.unsqueeze(1) * (x - start).square()).sum()
        return float((target.double() - joint @ x).square().sum() + moved)

    wanted = start.clone()
    for block in (slice(0, 4), slice(4, 8), slice(8, 8 + E)):
        here, damping = joint[:, block], ridge[block].sqrt()
        rest = target.double() - joint @ wanted + here @ wanted[block]
        augmented = torch.cat([here, torch.diag(damping)])
        aim = torch.cat([rest, damping.unsqueeze(1) * start[block]])
        wanted[block] = torch.linalg.lstsq(augmented, aim).solution
    two, constants = refit(features, down, gates, target.clone())
    found = torch.cat([torch.cat(two, 1).T, constants]).double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    joint_best = start + torch.linalg.solve(
        joint.T @ joint + torch.diag(ridge), joint.T @ (target.double() - joint @ start)
    )
    assert objective(joint_best) <= objective(found) < objective(start)


def test_refit_leaves_what_is_right_already() -> None:
    generator = torch.Generator().manual_seed(6)
    features = [of_values(torch.arange(T), torch.randn(T, 4, generator=generator))]
    down = [torch.randn(H, 4, generator=generator)]
    target = features[0].values @ down[0].T
    found, constants = refit(features, down, torch.rand(T, E, generator=generator), target)
    torch.testing.assert_close(found[0], down[0], rtol=0, atol=1e-4)
    assert float(constants.abs().max()) < 1e-4


def experts_of(width: int, hidden: int = 64, count: int = 16) -> ExpertsAnatomy:
    parts = (
        ExpertPart("gate_up_proj", (2 * width, hidden), "bfloat16", 4 * width * hidden),
        ExpertPart("down_proj", (hidden, width), "bfloat16", 2 * width * hidden),
    )
    return replace(_experts(ANATOMY), parts=parts, count=count)


def model_of(experts: ExpertsAnatomy) -> ModelAnatomy:
    layers = [replace(one, experts=experts if one.experts else None) for one in ANATOMY.layers]
    return replace(ANATOMY, layers=tuple(layers))


@given(
    st.sampled_from([16, 96, 512, 768, 1024, 1408, 2048]),
    st.integers(0, 19),
    st.sampled_from(["source", "int8", "int8+int4", "int4"]),
)
@settings(max_examples=100, deadline=None)
def test_trimming_keeps_no_more_bytes_than_removing_experts(
    width: int, twentieths: int, precision: str
) -> None:
    rate = twentieths / 20
    whole = experts_of(width)
    narrow = narrow_width(whole, rate, precision)
    layer = ANATOMY.moe_layers[0].index
    count = pool_kept(model_of(whole), [layer], rate, precision, trims=True)
    alone = kept(whole.count, rate)
    assert 1 <= narrow <= width and 1 <= count <= whole.count
    if rate == 0.0:
        assert (narrow, count) == (width, whole.count)
    kind = precision.split("+")[-1]
    assert count * record_bytes(whole.narrowed(narrow), kind) <= alone * record_bytes(whole, kind)
    assert count >= alone, "narrower prototypes are never fewer"
    assert count * narrow >= 0.9 * alone * width
    if width % 512 == 0:
        assert narrow % 64 == 0, "whole tiles of int4"
    shapes = {part.name: part.shape for part in whole.narrowed(narrow).parts}
    assert shapes["gate_up_proj"][0] == 2 * narrow and shapes["down_proj"][1] == narrow


def test_the_division_is_even_where_records_allow_it() -> None:
    found = [narrow_width(experts_of(1024, 2048, 64), rate, "int4") for rate in (0.25, 0.5, 0.75)]
    assert found == [896, 704, 512]  # 1024 * sqrt(1 - rate) in steps of 64
    small = experts_of(96, 192, 32)  # int4 has no half tiles, so nothing is gained by trimming
    assert narrow_width(small, 0.25, "int4") == 96
    assert narrow_width(small, 0.25, "source") == 80


def _anatomy() -> Any:
    from conmoe_edge.model.probe import probe

    return probe(tiny_model("qwen3_moe").config)


ANATOMY = _anatomy()


def _experts(anatomy: ModelAnatomy) -> ExpertsAnatomy:
    experts = anatomy.moe_layers[0].experts
    assert experts is not None
    return experts


def written(manifest: Manifest) -> int:
    """Bytes of all records."""
    return sum(manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes)


def test_the_plan_counts_what_is_written(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "source", mlp_only_layers=[])
    save_tokenizer(source)
    (tmp_path / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog 0123456789 " * 40
    )
    settings: dict[str, Any] = {
        "budget": "4GB",
        "device": "cpu",
        "calibration": tmp_path / "text.txt",
        "calibration_tokens": 1024,
    }
    api.fit(str(source), tmp_path / "free", rate=0.5, **settings)
    manifest = load_manifest(tmp_path / "free")
    assert manifest.method == "auto", "the default"
    assert 0 <= manifest.plan["chosen"]["pool_bytes"] - written(manifest) < 4096
    assert {one.nbytes for one in manifest.layouts} == {4096, 8192}

    api.fit(str(source), tmp_path / "equal", rate=0.5, widths="equal", **settings)
    manifest = load_manifest(tmp_path / "equal")
    assert written(manifest) == manifest.plan["chosen"]["pool_bytes"]
    narrow = _experts(trimmed(ANATOMY, 0.5, "source"))
    assert len(manifest.prototypes) == 3 * pool_kept(
        ANATOMY, [ANATOMY.moe_layers[0].index], 0.5, "source", trims=True
    )
    assert {one.nbytes for one in manifest.layouts} == {record_bytes(narrow, "source")}
    assert manifest.receipt["kl"] > 0

    api.fit(str(source), tmp_path / "whole", rate=0.0, **settings)
    manifest = load_manifest(tmp_path / "whole")
    assert all(
        slot.prototype == ExpertId(layer, number) and slot.scale == 1.0 and slot.constant is None
        for layer, row in manifest.slots.items()
        for number, slot in enumerate(row)
    )
    assert manifest.receipt["kl"] == pytest.approx(0.0, abs=1e-9)

    with pytest.raises(UsageError, match="within a layer"):
        api.fit(str(source), tmp_path / "two", rate=0.5, scope=2, method="auto", **settings)
    report = api.fit(str(source), tmp_path / "two", rate=0.5, scope=2, **settings)
    assert load_manifest(tmp_path / "two").method == "conmoe"
    assert report.plan.method == "conmoe" and "within a layer only" in report.plan.method_note
    planned = api.plan(str(source), budget="4GB", device="cpu", rate=0.5, scope=2)
    assert (planned.method, planned.method_note) == ("conmoe", report.plan.method_note)
    both = [
        api.plan(str(source), budget="4GB", device="cpu", rate=0.5, method=name).plan
        for name in (None, "auto", "conmoe")
    ]
    assert both[0] == both[1] and both[0].chosen == both[2].chosen, "bytes of whole experts"
    equal = api.plan(str(source), budget="4GB", device="cpu", rate=0.5, widths="equal").plan
    assert equal.chosen.pool_bytes <= both[0].chosen.pool_bytes
    with pytest.raises(UsageError, match="--widths some is not known"):
        api.plan(str(source), budget="4GB", device="cpu", widths="some")
    with pytest.raises(UsageError, match="not a method"):
        api.plan(str(source), budget="4GB", device="cpu", method="best")


@pytest.mark.parametrize("precision", ["int8", "int8+int4", "int4"])
def test_any_precision_is_written_as_planned_and_what_it_cost_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setenv("CONMOE_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {"hidden_size": 128, "moe_intermediate_size": 512, "head_dim": 16}
    source = save_tiny("qwen3_moe", tmp_path / "source", mlp_only_layers=[], **sizes)
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    levers: dict[str, Any] = {"budget": "4GB", "device": "cpu", "rate": 0.5, "precision": precision}
    report = api.fit(
        str(source), tmp_path / "out", calibration=text, calibration_tokens=1024, **levers
    )
    manifest = load_manifest(tmp_path / "out")
    chosen = report.plan.plan.chosen
    assert chosen.pool_bytes == manifest.plan["chosen"]["pool_bytes"]
    whole = _experts(report.plan.anatomy)
    if precision == "int8+int4":  # mixed: all of a layer have the same number of neurons
        assert written(manifest) == chosen.pool_bytes
        assert narrow_width(whole, 0.5, precision) < whole.width
    else:
        sizes = [record_bytes(whole.narrowed(one), precision) for one in steps(whole, precision)]
        assert len(sizes) == PARTS and {one.nbytes for one in manifest.layouts} <= {*sizes}
        assert 0 <= chosen.pool_bytes - written(manifest) < sizes[0]
    later = api.plan(str(source), **levers)
    (known,) = later.outcomes
    assert known.loss_rise == pytest.approx(
        report.receipt["loss_consolidated"] - report.receipt["loss_original"]
    )
    assert measured(later.plan.chosen, "source", later.outcomes, "auto") == known
    assert precision in later.advice and later.to_json()["advise"] == later.advice
    assert later.to_json()["measured"][0]["pool_bytes"] == chosen.pool_bytes


def scope_with(tokens: LayerTokens) -> tuple[ScopeView, int]:
    """A layer of a tiny model with random tokens on it, and how many of its experts may stay."""
    model = tiny_model("qwen3_moe")
    layer, (_, module) = next(iter(find_experts(model).items()))
    weights = LoadedLayer(module)
    pool = tuple(ExpertId(layer, number) for number in range(weights.experts))
    scope = ScopeWeights({layer: weights}, matrix_views(module))
    statistics = StatisticsTracker(len(pool))
    for expert in range(len(pool)):
        rows, gates = tokens.routed(expert)
        with torch.no_grad():
            out = expert_forward(module, tokens.hidden[rows], weights.parts(expert))
        statistics.add(expert, gates, out, None)
    view = LayerView(layer, len(pool), K, statistics.result(), tokens)
    return ScopeView(pool, (view,), scope, lambda: torch.zeros(0), module, (12,)), len(pool) // 2


def model_tokens(count: int, seed: int = 0) -> LayerTokens:
    """Random tokens for ``scope_with``; their target is what the experts give."""
    model = tiny_model("qwen3_moe")
    _, module = next(iter(find_experts(model).values()))
    experts = module.down_proj.shape[0]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, model.config.hidden_size, generator=generator)
    slots = torch.rand(count, experts, generator=generator).topk(K).indices
    gates = torch.rand(count, K, generator=generator) + 0.1
    target = torch.zeros(count, hidden.shape[1])
    with torch.no_grad():
        for t in range(count):
            for slot, gate in zip(slots[t].tolist(), gates[t], strict=True):
                parts = {n: getattr(module, n)[slot] for n in part_names(module)}
                target[t] += gate * expert_forward(module, hidden[t : t + 1], parts)[0]
    return LayerTokens(
        hidden, slots, gates, target=target, held=(torch.arange(count) // 8) % 4 == 3
    )


@torch.no_grad()
def test_the_error_of_a_decision_is_a_sum_over_tokens_and_slots() -> None:
    tokens = model_tokens(40)
    scope, keep = scope_with(tokens)
    decision = AUTO.decide(scope, keep)
    found = error_on(scope, tokens, decision)
    assert decision.parts is not None and tokens.target is not None
    table = decision.constants[scope.layers[0].layer]
    wanted = 0.0
    for t in range(len(tokens)):
        total = torch.zeros(tokens.hidden.shape[1])
        for slot, gate in zip(tokens.slots[t].tolist(), tokens.gates[t], strict=True):
            record = decision.slots[slot]
            if record.prototype is not None:
                parts = decision.parts(record.prototype)
                out = expert_forward(scope.module, tokens.hidden[t : t + 1], parts)[0]
                total += gate * record.scale * out
            if record.constant is not None:
                total += gate * table[record.constant]
        wanted += float((total - tokens.target[t]).square().sum())
    assert found == pytest.approx(wanted, rel=1e-4)
    assert wanted < 0.9 * float(tokens.target.square().sum())


@torch.no_grad()
def test_the_choice_that_does_best_on_held_tokens_wins_and_is_fitted_on_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = model_tokens(200)
    scope, keep = scope_with(tokens)
    fits: list[tuple[int, tuple[int, ...]]] = []
    errors: list[float] = []

    def fit(scope: ScopeView, tokens: LayerTokens, chosen: StandIns) -> Any:
        fits.append((len(tokens), chosen.prototypes))
        return rebuild(scope, tokens, chosen)

    def measure(scope: ScopeView, tokens: LayerTokens, decision: Any) -> float:
        assert tokens.held is not None and bool(tokens.held.all())
        errors.append(error_on(scope, tokens, decision))
        return errors[-1]

    def sets(
        errors: SlotErrors, contribution: Tensor, keep: int, layer: int
    ) -> tuple[StandIns, ...]:
        chosen = [(0, 1), (2, 3), (0, 1)]
        return tuple(StandIns(assign(errors, one)) for one in chosen)

    monkeypatch.setattr(auto_module, "rebuild", fit)
    monkeypatch.setattr(auto_module, "error_on", measure)
    monkeypatch.setattr(auto_module, "candidates", sets)
    decision = AUTO.decide(scope, keep)
    assert tokens.held is not None
    held = int(tokens.held.sum())
    assert [count for count, _ in fits] == [200 - held] * 3 + [200]
    assert errors[0] == errors[2] != errors[1]
    best = errors.index(min(errors))
    assert fits[-1][1] == fits[best][1]
    assert tuple(one.expert for one in decision.prototypes) == fits[best][1]


@torch.no_grad()
def test_candidates_are_named_once() -> None:
    found = slot_errors(tokens_of(), E, lambda e, x: x @ linear_experts()[e])
    sets = [one.prototypes for one in candidates(found, torch.arange(E).double(), 3)]
    assert len(set(sets)) == len(sets) <= 3
    must = must_stay(found.seen.energy, found.seen.peak, 3)
    assert sets[0] == select(found, 3, must)
    assert strongest(torch.arange(E).double(), 3, must) in sets
    assert all(set(must) <= set(one) for one in sets)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_handful_of_tokens_moves_little_and_breaks_nothing(count: int) -> None:
    tokens = model_tokens(count)
    scope, keep = scope_with(tokens)
    decision = AUTO.decide(scope, keep)
    assert decision.parts is not None
    unseen = model_tokens(100, seed=1)
    assert unseen.target is not None
    for expert in decision.prototypes:
        for part in decision.parts(expert).values():
            assert bool(part.isfinite().all())
    error = error_on(scope, unseen, decision)
    assert error < 1.3 * float(unseen.target.square().sum())


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


def test_a_deep_model_is_surveyed_with_fewer_sequences() -> None:
    assert [survey_module.sequences(layers) for layers in (1, 6, 16, 48, 94)] == [3, 3, 1, 1, 1]


@pytest.mark.parametrize(("best", "widths"), [(0, "free"), (1, "free"), (2, "free"), (1, "equal")])
def test_the_division_that_does_best_on_other_text_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int, widths: str
) -> None:
    seen: list[Any] = []

    def trial(run: Any, model: Any, found: Any, divisions: Any) -> list[float]:
        seen.extend(divisions)
        return [0.0 if number == best else 1.0 for number in range(len(divisions))]

    monkeypatch.setattr(survey_module, "share_out", lambda layers, each: [each - 2, each, each + 2])
    monkeypatch.setattr(survey_module, "_trial", trial)
    source = save_tiny("qwen3_moe", tmp_path / "source", mlp_only_layers=[])
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    levers: dict[str, Any] = {"budget": "4GB", "device": "cpu", "rate": 0.5, "widths": widths}
    api.fit(str(source), tmp_path / "out", calibration=text, calibration_tokens=512, **levers)
    manifest = load_manifest(tmp_path / "out")
    layers = sorted({one.id.layer for one in manifest.prototypes})
    assert seen[0] == dict.fromkeys(layers, seen[0][layers[0]]) and len(seen) == 3
    given = taken = 0
    for layer in layers:
        records = [
            manifest.layouts[one.layout].nbytes
            for one in manifest.prototypes
            if one.id.layer == layer
        ]
        if widths == "equal":
            assert len(records) == seen[best][layer]
            continue
        given += seen[best][layer] * 8192 // 4
        taken += sum(records)
        assert 0 <= given - taken < 4096, "what a layer leaves goes to the next"


def test_the_trial_measures_what_the_divisions_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all neurons kept the output is the original's; the more goes, the farther it is."""
    found: list[list[float]] = []
    inner = survey_module._trial

    def trial(run: Any, model: Any, errors: Any, divisions: Any) -> list[float]:
        counts = [{layer: units for layer in divisions[0]} for units in (8 * 4, 4 * 4, 1 * 4)]
        found.append(inner(run, model, errors, counts))
        return inner(run, model, errors, divisions)

    monkeypatch.setattr(survey_module, "share_out", lambda layers, each: [each - 1, each, each + 1])
    monkeypatch.setattr(survey_module, "_trial", trial)
    source = save_tiny("qwen3_moe", tmp_path / "source", mlp_only_layers=[])
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    levers: dict[str, Any] = {"budget": "4GB", "device": "cpu", "rate": 0.5}
    api.fit(str(source), tmp_path / "out", calibration=text, calibration_tokens=512, **levers)
    ((whole, half, one),) = found
    assert whole < 1e-6 < half < one


def test_layers_that_are_worth_nothing_or_lose_nothing_break_nothing() -> None:
    flat = LayerWorth((0.0,) * (E + 1), 0.0)
    assert sum(share_out([flat, flat], 3)) == 6
    dear = LayerWorth(tuple(float(E - k) for k in range(E + 1)), 1.0)
    assert share_out([flat, dear], 3) == [1, 5]


def test_no_layer_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer has been left, in the survey or after it, no tap holds on to its experts."""
    holding: list[bool] = []
    leave = StreamedModel.layer

    @contextmanager
    def layer(self: StreamedModel, index: int, *, with_experts: bool = True) -> Iterator[Any]:
        with leave(self, index, with_experts=with_experts) as module:
            yield module
        taps = [getattr(experts, "_conmoe_tap", None) for _, experts in self.experts.values()]
        holding.append(any(isinstance(tap, MappedTap) for tap in taps))

    monkeypatch.setattr(StreamedModel, "layer", layer)
    source = save_tiny("afmoe", tmp_path / "source")  # a norm comes after its experts
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    levers: dict[str, Any] = {"budget": "4GB", "device": "cpu", "rate": 0.5, "method": "auto"}
    api.fit(str(source), tmp_path / "out", calibration=text, calibration_tokens=512, **levers)
    assert holding and not any(holding)


@torch.no_grad()
def test_weighted_tokens_give_weighted_squares() -> None:
    """The error over weighted tokens is the sum of w^2 |target - y|^2 over the tokens as they are."""
    tokens = model_tokens(24)
    weights = torch.rand(24, generator=torch.Generator().manual_seed(2)) + 0.5
    tokens = replace(tokens, weights=weights)
    assert tokens.target is not None
    scope, keep = scope_with(tokens)
    decision = AUTO.decide(scope, keep)
    wanted = sum(
        float(weights[t]) ** 2 * error_on(scope, tokens.rows(torch.tensor([t])), decision)
        for t in range(24)
    )
    assert error_on(scope, tokens.weighted(), decision) == pytest.approx(wanted, rel=1e-4)
    assert tokens.weighted().weights is None and model_tokens(3).weighted().weights is None


def test_other_sequences_are_others_where_there_are_enough() -> None:
    names = tuple(str(n) for n in range(16))
    whole = TokenSet(torch.arange(16).unsqueeze(1), torch.ones(16, 1, dtype=torch.bool), names)
    first, second = whole.some(4), whole.some(4, after=1)
    assert first.domains == ("0", "4", "8", "12") and second.domains == ("1", "5", "9", "13")
    assert len(whole.some(2).some(4, after=1).domains) == 2
