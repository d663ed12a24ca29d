"""``auto`` step by step against plain transcriptions, and what must hold of each step."""

from __future__ import annotations

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
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.compress.methods import auto as auto_module
from conmoe_edge.compress.methods.auto import AUTO
from conmoe_edge.compress.methods.interface import LayerView, ScopeView
from conmoe_edge.compress.methods.rebuild import StandIns, error_on, rebuild
from conmoe_edge.compress.solvers.facility import (
    assign,
)
from conmoe_edge.compress.solvers.slot_errors import SlotErrors
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stats.statistics import StatisticsTracker
from conmoe_edge.compress.stream.scope_weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.errors import UsageError
from conmoe_edge.model.anatomy import ExpertPart, ExpertsAnatomy, ModelAnatomy
from conmoe_edge.model.experts import expert_forward, find_experts, part_names
from conmoe_edge.plan.advice import measured
from conmoe_edge.plan.levers import kept, record_bytes
from conmoe_edge.plan.width_levers import PARTS, narrow_width, pool_kept, steps, trimmed

K = 2


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
    assert 0 <= manifest.plan["chosen"]["pool_bytes"] - written(manifest) < 1536
    assert {one.nbytes for one in manifest.layouts} <= {1536, 3072, 4608, 6144}
    assert len(manifest.layouts) > 1

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
    assert measured(later.plan.chosen, later.plan, later.outcomes, "auto") == known
    assert later.advice == later.to_json()["advise"] == "", "nothing better was measured"
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
