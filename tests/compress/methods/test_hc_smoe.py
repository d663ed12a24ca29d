"""HC-SMoE against a transcription of the paper in plain loops, and what must hold of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.compress.methods import METHODS, hc_smoe
from conmoe_edge.compress.methods.interface import ScopeView
from conmoe_edge.compress.solvers.grouping import average_linkage
from conmoe_edge.compress.solvers.neuron_pruning import take_neurons
from conmoe_edge.errors import UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.experts import expert_forward, part_names

METHOD = METHODS["hc-smoe"]


def plain_clusters(points: list[list[float]], keep: int) -> list[list[int]]:
    """All pairs of clusters are tried, and the closest on average become one."""

    def apart(a: int, b: int) -> float:
        squares = [(x - y) ** 2 for x, y in zip(points[a], points[b], strict=True)]
        return sum(squares) ** 0.5

    clusters = [[one] for one in range(len(points))]
    while len(clusters) > keep:
        _, i, j = min(
            (sum(apart(a, b) for a in one for b in other) / (len(one) * len(other)), i, j)
            for i, one in enumerate(clusters)
            for j, other in enumerate(clusters)
            if i < j
        )
        clusters[i] = sorted(clusters[i] + clusters.pop(j))
    return sorted(clusters)


def plain_features(scope: ScopeView, modules: dict[int, Any]) -> list[list[float]]:
    """Every expert on every token of its layer, one token at a time."""
    found = []
    for layer in scope.layers:
        assert layer.tokens is not None
        module = modules[layer.layer]
        for expert in range(layer.experts):
            with torch.no_grad():
                outputs = [
                    expert_forward(module, row.unsqueeze(0), parts_of(module, expert))[0].double()
                    for row in layer.tokens.hidden
                ]
            found.append((sum(outputs) / len(outputs)).tolist())  # type: ignore[union-attr]
    return found


def same_clusters(decision: Any, pool: tuple[ExpertId, ...]) -> list[list[int]]:
    """Which places of the pool have one prototype."""
    return sorted(
        [i for i, slot in enumerate(decision.slots) if slot.prototype == prototype]
        for prototype in decision.prototypes
    )


@pytest.mark.parametrize(
    ("layout", "layers"), [*((one, 1) for one in LAYOUTS), *((one, 2) for one in LAYOUTS[:-1])]
)
def test_decision_equals_the_paper(layout: str, layers: int) -> None:
    modules = {4: module_of(layout), 5: module_of(layout)}
    with torch.no_grad():
        for name in part_names(modules[5]):
            getattr(modules[5], name).mul_(1.3)
    modules = dict(list(modules.items())[:layers])
    scope = scope_of({n: (one, tokens_for(one, 80, seed=n)) for n, one in modules.items()})
    keep = 3 * layers
    decision = METHOD.decide(scope, keep)
    clusters = plain_clusters(plain_features(scope, modules), keep)
    assert same_clusters(decision, scope.pool) == clusters
    assert any(len(members) > 1 for members in clusters)
    usage = [n for layer in scope.layers for n in layer.statistics.counts]
    assert decision.parts is not None
    for members in clusters:
        name = scope.pool[max(members, key=lambda one: (usage[one], -one))]
        assert name in decision.prototypes and decision.slots[members[0]].prototype == name
        found = decision.parts(name)
        total = sum(usage[one] for one in members)
        for key in found:
            wanted = sum(
                parts_of(modules[scope.pool[one].layer], scope.pool[one].expert)[key].double()
                * (usage[one] / total)
                for one in members
            )
            torch.testing.assert_close(found[key].double(), wanted, rtol=1e-5, atol=1e-7)


@given(st.integers(0, 400), st.integers(2, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_clusters_equal_trying_all_pairs(seed: int, count: int, data: st.DataObject) -> None:
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).double()
    keep = data.draw(st.integers(1, count))
    found = average_linkage(points, keep)
    assert [list(one) for one in found] == plain_clusters(points.tolist(), keep)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_as_many_clusters_as_asked_for_among_equals(values: list[int], keep: int) -> None:
    points = torch.tensor(values).double().unsqueeze(1)
    found = average_linkage(points, keep)
    assert len(found) == min(keep, len(values))
    assert sorted(one for members in found for one in members) == list(range(len(values)))
    assert found == average_linkage(points.clone(), keep)
    distinct = len(set(values))
    if keep >= distinct:
        assert all(len({values[one] for one in members}) == 1 for members in found), (
            "unequal ones are not merged while equal ones are left"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merging_equal_experts_is_exact(layout: str) -> None:
    module = module_of(layout)
    with torch.no_grad():
        for name in part_names(module):
            getattr(module, name)[5] = getattr(module, name)[2]
    scope = scope_of({1: (module, tokens_for(module))})
    decision = METHOD.decide(scope, count_of(module) - 1)
    assert decision.slots[2].prototype == decision.slots[5].prototype
    assert decision.parts is not None
    for name in decision.prototypes:
        wanted = parts_of(module, name.expert)
        assert all(torch.equal(part, wanted[key]) for key, part in decision.parts(name).items())
    before, after = layer_outputs(scope, decision)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_the_order_of_neurons_changes_nothing_of_the_clusters() -> None:
    for layout in LAYOUTS:
        module = module_of(layout)
        tokens = tokens_for(module)
        before = METHOD.decide(scope_of({0: (module, tokens)}), 3)
        generator = torch.Generator().manual_seed(1)
        width = module.down_proj.shape[1 if module.is_transposed else 2]
        with torch.no_grad():
            for expert in range(count_of(module)):
                order = torch.randperm(width, generator=generator)
                moved = take_neurons(module, parts_of(module, expert), order)
                for name, part in moved.items():
                    getattr(module, name)[expert] = part.clone()
        after = METHOD.decide(scope_of({0: (module, tokens)}), 3)
        assert after.slots == before.slots and after.prototypes == before.prototypes


def test_a_scope_of_several_layers_is_refused_where_a_norm_belongs_to_a_layer() -> None:
    module = module_of("norm")
    scope = scope_of({0: (module, tokens_for(module)), 1: (module, tokens_for(module))})
    with pytest.raises(UsageError, match="within a layer"):
        METHOD.decide(scope, 3)


def test_nothing_is_changed_where_all_are_kept() -> None:
    module = module_of("qwen3_moe")
    scope = scope_of({0: (module, tokens_for(module))})
    for keep in (count_of(module), count_of(module) + 1):
        decision = METHOD.decide(scope, keep)
        assert decision.parts is None and decision.prototypes == scope.pool
        assert tuple(slot.prototype for slot in decision.slots) == scope.pool


def test_experts_that_nobody_chose_are_averaged_equally_and_said_so() -> None:
    module = module_of("gpt_oss")
    unused = (1, 3, 6, 7)
    with torch.no_grad():  # two of them give the same, so that they meet
        for name in part_names(module):
            getattr(module, name)[6] = getattr(module, name)[3] + 1e-6
    scope = scope_of({2: (module, tokens_for(module, unused=unused))})
    decision = METHOD.decide(scope, 7)
    assert decision.parts is not None and decision.slots[6].prototype == ExpertId(2, 3)
    found = decision.parts(ExpertId(2, 3))
    for key, part in found.items():
        wanted = (parts_of(module, 3)[key] + parts_of(module, 6)[key]) / 2
        torch.testing.assert_close(part, wanted)
    assert decision.notes == (
        "Layer 2: no calibration token came to 1 of 1 merged groups; their experts are averaged equally.",
    )
    for keep in (1, 3):
        decision = METHOD.decide(scope, keep)
        assert decision.parts is not None and decision.notes == ()
        for name in decision.prototypes:
            assert all(bool(part.isfinite().all()) for part in decision.parts(name).values())


def test_chunks_change_nothing_and_the_sample_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("granitemoe")
    tokens = tokens_for(module)
    whole = hc_smoe.mean_outputs(scope_of({0: (module, tokens)}))
    monkeypatch.setattr(hc_smoe, "_CHUNK", 7)
    torch.testing.assert_close(hc_smoe.mean_outputs(scope_of({0: (module, tokens)})), whole)
    monkeypatch.setattr(hc_smoe, "SAMPLE_TOKENS", 100)
    found = hc_smoe.mean_outputs(scope_of({0: (module, tokens)}))
    third = tokens.rows(torch.arange(0, 300, 3))
    torch.testing.assert_close(found, hc_smoe.mean_outputs(scope_of({0: (module, third)})))
    assert not torch.equal(found, whole)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = save_tiny("qwen3_moe", tmp_path / "source", mlp_only_layers=[])
    save_tokenizer(folder)
    (tmp_path / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog 0123456789 " * 40
    )
    return folder


@pytest.mark.parametrize("scope", [1, 2])
def test_a_package_has_the_planned_bytes_and_needs_no_memory(
    source: Path, tmp_path: Path, scope: int
) -> None:
    text = tmp_path / "text.txt"
    out = tmp_path / "out"
    levers: dict[str, Any] = {"budget": "4GB", "device": "cpu", "rate": 0.5, "scope": scope}
    api.fit(str(source), out, method="hc-smoe", calibration=text, calibration_tokens=512, **levers)
    manifest = load_manifest(out)
    assert len(manifest.prototypes) == 12 and manifest.method == "hc-smoe"
    records = sum(manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes)
    assert records == manifest.plan["chosen"]["pool_bytes"]
    assert 0 < manifest.receipt["kl"] < 5
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        resident = api.load(out, device="cpu")(input_ids=ids, use_cache=False).logits
        starved = load_package(out, device="cpu", slots=(1,))(input_ids=ids, use_cache=False)
    assert torch.equal(starved.logits, resident)
