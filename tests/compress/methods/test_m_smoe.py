"""M-SMoE and MC-SMoE against transcriptions of their formulas in plain loops, and through packages of every layout."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import save_tiny, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conmoe_edge import api
from conmoe_edge.checkpoint.format.forms import factored_sizes
from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest
from conmoe_edge.checkpoint.format.records import decode
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.cli.main import main
from conmoe_edge.compress.methods import METHODS
from conmoe_edge.compress.methods.interface import LayerView, ScopeView
from conmoe_edge.compress.solvers.grouping import around_dominant, router_likeness
from conmoe_edge.compress.solvers.low_rank import factor
from conmoe_edge.compress.solvers.neuron_pruning import take_neurons
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stats.statistics import LayerStatistics
from conmoe_edge.errors import PackageError, UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.experts import expert_forward
from conmoe_edge.plan.levers import LOW_RANK, record_bytes

H, WIDTH, E, T = 4, 4, 6, 80


class Experts(nn.Module):
    """A module with the marks of transformers', gate and up in halves."""

    def __init__(self) -> None:
        super().__init__()
        self.has_gate = self.is_concatenated = True
        self.is_transposed = self.has_post_expert_norm = False

    def _apply_gate(self, value: Tensor) -> Tensor:
        gate, up = value.chunk(2, -1)
        return nn.functional.silu(gate) * up


class Pool:
    """Experts in memory."""

    def __init__(self, experts: list[dict[str, Tensor]]) -> None:
        self.experts = experts

    def parts(self, expert: ExpertId) -> dict[str, Tensor]:
        return self.experts[expert.expert]


def experts_of(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "gate_up_proj": torch.randn(2 * WIDTH, H, generator=generator),
            "down_proj": torch.randn(H, WIDTH, generator=generator),
        }
        for _ in range(E)
    ]


def scope_of(
    experts: list[dict[str, Tensor]], seed: int = 0, unused: tuple[int, ...] = ()
) -> ScopeView:
    """One layer whose router chose two of six slots for each of 80 tokens, ``unused`` never."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator)
    choice = logits.clone()
    choice[:, list(unused)] = -math.inf
    gates, slots = choice.softmax(-1).topk(2)
    tokens = LayerTokens(torch.randn(T, H, generator=generator), slots, gates, logits)
    counts = torch.bincount(slots.flatten(), minlength=E).tolist()
    sums = (0.0,) * E
    pool = tuple(ExpertId(3, expert) for expert in range(E))
    view = LayerView(3, E, 2, LayerStatistics(sums, sums, tuple(counts)), tokens)
    return ScopeView(pool, (view,), Pool(experts), lambda: torch.zeros(E, E), Experts(), WIDTH)


def brute(scope: ScopeView, keep: int) -> tuple[list[int], list[int], dict[int, dict[str, Tensor]]]:
    """The paper, step by step: dominant experts, the core of every expert, merged weights."""
    layer, weights = scope.layers[0], scope.weights
    tokens = layer.tokens
    assert tokens is not None and tokens.logits is not None
    counts = [0] * E
    for row in tokens.slots.tolist():
        for slot in row:
            counts[slot] += 1
    cores = sorted(sorted(range(E), key=lambda e: (-counts[e], e))[:keep])

    logits = tokens.logits

    def similarity(i: int, j: int) -> float:
        a, b = logits[:, i].tolist(), logits[:, j].tolist()
        inner = sum(x * y for x, y in zip(a, b, strict=True))
        return (1 + inner / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))) / 2

    core_of = [
        e if e in cores else max(cores, key=lambda c: (similarity(e, c), -c)) for e in range(E)
    ]

    def neuron(parts: dict[str, Tensor], i: int) -> Tensor:
        up = parts["gate_up_proj"]
        return torch.cat([up[i], up[WIDTH + i], parts["down_proj"][:, i]])

    def in_order(parts: Any) -> dict[str, Tensor]:
        first: Any = weights.parts(scope.pool[0])
        best = max(
            permutations(range(WIDTH)),
            key=lambda p: sum(float(neuron(first, i) @ neuron(parts, p[i])) for i in range(WIDTH)),
        )
        order = list(best)
        both = order + [WIDTH + i for i in order]
        return {
            "gate_up_proj": parts["gate_up_proj"][both],
            "down_proj": parts["down_proj"][:, order],
        }

    merged = {}
    for core in cores:
        members = [e for e in range(E) if core_of[e] == core]
        used = [float(counts[e]) for e in members]
        if sum(used) == 0:
            used = [1.0] * len(members)
        parts = [in_order(weights.parts(scope.pool[e])) for e in members]
        merged[core] = {
            name: sum(u * p[name] for u, p in zip(used, parts, strict=True)) / sum(used)
            for name in parts[0]
        }
        if len(members) == 1:
            merged[core] = dict(weights.parts(scope.pool[core]))
    return cores, core_of, merged


@given(st.integers(0, 200), st.integers(1, E - 1))
@settings(max_examples=25, deadline=None)
def test_the_decision_is_the_papers(seed: int, keep: int) -> None:
    scope = scope_of(experts_of(seed), seed, unused=(5,) if seed % 3 == 0 else ())
    cores, core_of, merged = brute(scope, keep)
    decision = METHODS["m-smoe"].decide(scope, keep)
    assert decision.prototypes == tuple(ExpertId(3, core) for core in cores)
    assert [slot.prototype for slot in decision.slots] == [ExpertId(3, core) for core in core_of]
    assert all(slot.scale == 1.0 and slot.constant is None for slot in decision.slots)
    assert decision.parts is not None
    for core in cores:
        for name, part in decision.parts(ExpertId(3, core)).items():
            torch.testing.assert_close(part, merged[core][name], rtol=1e-5, atol=1e-6)


@given(st.integers(0, 100), st.permutations(range(WIDTH)), st.integers(1, E))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("name", ["m-smoe", "mc-smoe"])
def test_the_order_of_an_experts_neurons_changes_nothing(
    name: str, seed: int, order: list[int], keep: int
) -> None:
    """Only how neurons are numbered: the function of every prototype stays."""
    experts = experts_of(seed)
    which = seed % E
    other = list(experts)
    other[which] = take_neurons(Experts(), experts[which], torch.tensor(order))
    hidden = torch.randn(9, H, generator=torch.Generator().manual_seed(1))
    before, after = (METHODS[name].decide(scope_of(one, seed), keep) for one in (experts, other))
    assert before.prototypes == after.prototypes and before.slots == after.slots
    if before.parts is None or after.parts is None:
        assert name == "m-smoe" and keep == E
        return
    for prototype in before.prototypes:
        one, two = (
            expert_forward(Experts(), hidden, decode(d.parts(prototype), torch.float32, False))
            for d in (before, after)
            if d.parts is not None
        )
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_equal_experts_merge_to_themselves_bit_for_bit() -> None:
    first = experts_of(1)[0]
    generator = torch.Generator().manual_seed(2)
    equal = [
        take_neurons(Experts(), first, torch.randperm(WIDTH, generator=generator)) for _ in range(E)
    ]
    decision = METHODS["m-smoe"].decide(scope_of(equal), 1)
    assert decision.parts is not None
    merged = decision.parts(decision.prototypes[0])
    assert all(torch.equal(merged[name], equal[0][name]) for name in merged)


def test_nothing_is_changed_where_all_are_kept() -> None:
    decision = METHODS["m-smoe"].decide(scope_of(experts_of(0)), E)
    assert decision.parts is None
    assert [slot.prototype for slot in decision.slots] == list(decision.prototypes)


def test_experts_that_nobody_used_are_no_error_and_are_named() -> None:
    scope = scope_of(experts_of(4), unused=(2, 3, 4, 5))
    for name in ("m-smoe", "mc-smoe"):
        decision = METHODS[name].decide(scope, 5)
        assert decision.parts is not None
        for prototype in decision.prototypes:
            assert all(bool(p.isfinite().all()) for p in decision.parts(prototype).values())
        (note,) = decision.notes
        assert note.startswith("Layer 3: no calibration token came to 3 of the groups")


def test_likeness_of_flat_columns_is_no_nan_and_ties_go_to_the_lowest() -> None:
    found = router_likeness(torch.zeros(5, 3))
    assert bool((found == 0.5).all())
    groups = around_dominant([1, 4, 4, 4], torch.full((4, 4), 0.5), 2)
    assert groups.cores == (1, 2) and groups.core_of == (1, 1, 2, 1)
    assert groups.members(1) == (0, 1, 3)


@pytest.mark.parametrize("keep", [2, E])
def test_merged_matrices_are_factored_on_what_the_group_gets(keep: int) -> None:
    """Also where all are kept: nothing is merged then, and every expert is factored."""
    scope = scope_of(experts_of(7), 7)
    cores, core_of, merged = brute(scope, keep)
    decision = METHODS["mc-smoe"].decide(scope, keep)
    assert decision.prototypes == tuple(ExpertId(3, core) for core in cores)
    assert decision.parts is not None
    tokens = scope.layers[0].tokens
    assert tokens is not None
    for core in cores:
        gram = {"gate_up_proj": torch.zeros(H, H), "down_proj": torch.zeros(WIDTH, WIDTH)}
        for t in range(T):
            pairs = zip(tokens.slots[t].tolist(), tokens.gates[t].tolist(), strict=True)
            alpha = sum(gate for slot, gate in pairs if core_of[slot] == core)
            x = alpha * tokens.hidden[t]
            value = merged[core]["gate_up_proj"] @ tokens.hidden[t]
            inner = alpha * nn.functional.silu(value[:WIDTH]) * value[WIDTH:]
            gram["gate_up_proj"] += torch.outer(x, x)
            gram["down_proj"] += torch.outer(inner, inner)
        back = decode(decision.parts(ExpertId(3, core)), torch.float32, False)
        for name, weight in merged[core].items():
            wanted = factor(weight, gram[name], *factored_sizes(*weight.shape)).expand()
            torch.testing.assert_close(back[name], wanted, rtol=1e-3, atol=1e-3)


# -- packages ---------------------------------------------------------------------------------------------------------

LAYOUTS = ("olmoe", "gpt_oss")  # plain; transposed, interleaved, with biases
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "head_dim": 24,
}
TEXT = "the quick brown fox jumps over the lazy dog 0123456789 " * 40


@pytest.fixture(scope="module", params=LAYOUTS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "source"
    save_tiny(request.param, folder, dtype=torch.bfloat16, **SIZES)
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def fit(source: Path, out: Path, **levers: Any) -> Manifest:
    given_: dict[str, Any] = {"budget": "4GB", "rate": 0.5, **levers}
    text = source.parent / "text.txt"
    api.fit(str(source), out, device="cpu", calibration=text, calibration_tokens=512, **given_)
    return load_manifest(out)


def test_factored_packages_are_small_as_planned_and_run_in_bf16(
    source: Path, tmp_path: Path
) -> None:
    """Bytes fall on the disk, and one cache slot gives the same bits as all of them."""
    manifest = fit(source, tmp_path / "out", method="mc-smoe")
    assert manifest.precision == LOW_RANK and manifest.method == "mc-smoe"
    planned = api.plan(str(source), budget="4GB", device="cpu", rate=0.5, method="mc-smoe")
    assert planned.plan.chosen.pool_bytes == manifest.plan["chosen"]["pool_bytes"]
    experts = planned.anatomy.moe_layers[0].experts
    assert experts is not None
    written = sum(manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes)
    assert written == manifest.plan["chosen"]["pool_bytes"], "bytes planned are bytes written"
    assert {one.nbytes for one in manifest.layouts} == {record_bytes(experts, LOW_RANK)}
    assert record_bytes(experts, LOW_RANK) < 0.4 * record_bytes(experts, "source")
    files = [f for f in (tmp_path / "out").iterdir() if f.name.startswith("prototypes-")]
    on_disk = sum(file.stat().st_size for file in files)
    assert written <= on_disk < written + 65536
    assert 0 < manifest.receipt["kl"] < 5
    resident = load_package(tmp_path / "out", device="cpu")
    starved = load_package(tmp_path / "out", device="cpu", slots=(1,))
    prompt = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(5))
    found = [
        model.generate(prompt, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
        for model in (resident, starved)
    ]
    assert torch.equal(*found)
    with torch.no_grad():
        assert torch.equal(*(model(prompt).logits for model in (resident, starved)))


def test_rate_zero_merges_nothing_and_factors_every_expert(source: Path, tmp_path: Path) -> None:
    manifest = fit(source, tmp_path / "m", method="m-smoe", rate=0.0, precision="source")
    assert manifest.receipt["kl"] == pytest.approx(0.0, abs=1e-9)
    manifest = fit(source, tmp_path / "mc", method="mc-smoe", rate=0.0)
    assert all(
        slot.prototype == ExpertId(layer, number)
        for layer, row in manifest.slots.items()
        for number, slot in enumerate(row)
    )
    assert {one.precision for one in manifest.layouts} == {LOW_RANK}
    assert manifest.receipt["kl"] > 1e-6


def test_what_does_not_go_together_is_refused(source: Path, tmp_path: Path) -> None:
    for levers, why in [
        ({"method": "mc-smoe", "precision": "int8"}, "mc-smoe cannot be stored in int8"),
        ({"method": "conmoe", "precision": LOW_RANK}, "conmoe cannot be stored in lowrank"),
        ({"method": "m-smoe", "scope": 2}, "within a layer"),
        ({"method": "mc-smoe", "scope": 2}, "within a layer"),
        ({"method": "magic"}, "not a method"),
    ]:
        with pytest.raises(UsageError, match=why) as error:
            fit(source, tmp_path / "out", **levers)
        assert "--" in error.value.fix
        with pytest.raises(UsageError, match=why):
            api.plan(str(source), budget="4GB", device="cpu", **levers)
    assert not (tmp_path / "out").exists()
    fit(source, tmp_path / "out", method="mc-smoe", precision=LOW_RANK)


def test_a_record_that_does_not_fit_the_model_is_refused(source: Path, tmp_path: Path) -> None:
    fit(source, tmp_path / "out", method="mc-smoe")
    path = tmp_path / "out" / "conmoe.json"
    good = path.read_text()
    for part in ("left", "right", "kept", "columns"):
        bad = json.loads(good)
        for one in bad["layouts"][0]["parts"]:
            if one["name"] == f"down_proj.{part}":
                one["shape"][-1] -= 1
                size = {"int32": 4, "bfloat16": 2}[one["dtype"]]
                one["nbytes"] = size * math.prod(one["shape"])
        path.write_text(json.dumps(bad))
        with pytest.raises(PackageError, match="does not match"):
            load_package(tmp_path / "out", device="cpu")


def test_a_dry_run_counts_as_the_fit_will(source: Path) -> None:
    command = [
        *("fit", str(source), "--gpu", "4GB", "--device", "cpu", "--rate", "50%", "--dry-run"),
        *("--json", "--method", "mc-smoe"),
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plan"]["chosen"]["precision"] == LOW_RANK
    result = CliRunner().invoke(main, [*command, "--precision", "int8"])
    assert result.exit_code != 0
