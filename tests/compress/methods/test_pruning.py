"""The one-shot pruning family and MoNE against transcriptions of their formulas in plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from families import save_tiny, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE, read_constants
from conmoe_edge.compress.methods import METHODS
from conmoe_edge.compress.methods.interface import LayerView, ScopeView
from conmoe_edge.compress.methods.mone import score as mone_score
from conmoe_edge.compress.methods.pruning import POINTS, Point, score
from conmoe_edge.compress.solvers.ranking import best_of, survivors
from conmoe_edge.compress.stats.statistics import (
    LayerStatistics,
    OutputVectors,
    StatisticsTracker,
    VectorTracker,
)
from conmoe_edge.errors import CheckpointError, UsageError
from conmoe_edge.model.bridge import build_meta, read_config
from conmoe_edge.model.rerouting import reroute
from conmoe_edge.model.router import Selection, find_routers

EXPERTS, H = 5, 4
Routed = list[tuple[list[float], list[list[float]], list[bool]]]


def routed(seed: int = 0) -> Routed:
    """Gates, outputs and which tokens are real, of every expert; the last one was never chosen."""
    generator = torch.Generator().manual_seed(seed)
    found: Routed = []
    for count in (6, 1, 4, 9, 0):
        gates = torch.rand(count, generator=generator).tolist()
        outputs = torch.randn(count, H, generator=generator).tolist()
        found.append((gates, outputs, [i != 2 for i in range(count)]))
    return found


def seen(tokens: Routed) -> tuple[LayerStatistics, OutputVectors]:
    """The same through the trackers, in two batches each."""
    statistics, vectors = StatisticsTracker(EXPERTS), VectorTracker(EXPERTS, H)
    for expert, (gates, outputs, real) in enumerate(tokens):
        half = len(gates) // 2
        for part in (slice(0, half), slice(half, None)):
            if gates[part]:
                values, keep = torch.tensor(outputs[part]), torch.tensor(real[part])
                statistics.add(expert, torch.tensor(gates[part]), values, keep)
                vectors.add(expert, values, keep)
    return statistics.result(), vectors.result()


def brute_score(tokens: Routed, point: Point) -> list[float]:
    found = []
    for gates, outputs, real in tokens:
        total, count = 0.0, 0
        for gate, output, counts in zip(gates, outputs, real, strict=True):
            if counts:
                norm = math.sqrt(sum(value * value for value in output))
                total += gate**point.alpha * norm**point.beta
                count += 1
        found.append(total / count**point.b if count else 0.0)
    return found


@pytest.mark.parametrize("name", POINTS)
def test_score_is_the_formula(name: str) -> None:
    tokens = routed()
    found = score(POINTS[name], seen(tokens)[0])
    wanted = torch.tensor(brute_score(tokens, POINTS[name]), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)
    assert found[-1] == 0.0


def test_the_named_points_are_the_published_ones() -> None:
    exponents = {name: (point.b, point.alpha, point.beta) for name, point in POINTS.items()}
    assert exponents == {
        "frequency": (0, 0, 0),
        "seer": (0, 1, 0),
        "ean": (0, 0, 1),
        "reap": (1, 1, 1),
        "man": (1, 0, 1),
        "msan": (1, 0, 2),
        "energy": (0, 2, 2),
    }
    assert {f"{name}{end}" for name in POINTS for end in ("", "+drop")} < set(METHODS)


def test_reap_is_the_contribution_of_conmoe() -> None:
    statistics, _ = seen(routed())
    assert torch.equal(score(POINTS["reap"], statistics), statistics.contribution())


def test_all_sums_survive_json_exactly() -> None:
    statistics, _ = seen(routed())
    assert LayerStatistics.from_json(json.loads(json.dumps(statistics.to_json()))) == statistics


def scope_of(
    layers: list[tuple[LayerStatistics, OutputVectors]], selection: Selection | None = None
) -> ScopeView:
    def nothing() -> Tensor:
        raise AssertionError("no distance is needed")

    views = tuple(
        LayerView(number, EXPERTS, 2, statistics, None, vectors, selection)
        for number, (statistics, vectors) in enumerate(layers)
    )
    pool = tuple(ExpertId(view.layer, expert) for view in views for expert in range(EXPERTS))
    return ScopeView(pool, views, None, nothing, nn.Module())  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", range(2, EXPERTS + 1))
@pytest.mark.parametrize("name", [*POINTS, "man+drop", "energy+drop"])
def test_the_best_stay_and_the_rest_are_empty(name: str, keep: int) -> None:
    tokens = routed(3)
    wanted = brute_score(tokens, POINTS[name.removesuffix("+drop")])
    best = sorted(sorted(range(EXPERTS), key=lambda e: (-wanted[e], e))[:keep])
    decision = METHODS[name].decide(scope_of([seen(tokens)], Selection(2)), keep)
    assert [expert.expert for expert in decision.prototypes] == best
    for expert, slot in enumerate(decision.slots):
        assert slot.prototype == (ExpertId(0, expert) if expert in best else None)
        assert slot.scale == 1.0 and slot.constant is None
    assert decision.parts is None and not decision.constants
    assert bool(decision.rerouted) == (keep < EXPERTS and not name.endswith("+drop"))


def test_a_scope_of_two_layers_compares_shares_and_starves_none() -> None:
    """The second layer's outputs are a thousand times greater, which must not matter."""
    one = seen(routed(1))
    gates, norms = one[0].gates, one[0].weighted_norms
    large = LayerStatistics(tuple(1000 * x for x in norms), gates, one[0].counts)
    decision = METHODS["reap"].decide(scope_of([one, (large, one[1])], Selection(2)), 6)
    assert sorted(expert.layer for expert in decision.prototypes) == [0, 0, 0, 1, 1, 1]
    lonely = LayerStatistics((1.0, 0.0, 0.0, 0.0, 0.0), gates, (1, 1, 1, 1, 1))
    decision = METHODS["reap"].decide(scope_of([one, (lonely, one[1])], Selection(2)), 5)
    assert [expert.layer for expert in decision.prototypes].count(1) == 2, "its router takes two"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_survivors_keep_what_is_asked(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 2, 4]))
    values = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=8, max_size=8)
    scores = [torch.tensor(data.draw(values)) for _ in range(layers)]
    floors = [data.draw(st.integers(0, 4)) for _ in range(layers)]
    keep = data.draw(st.integers(sum(floors), 8 * layers))
    found = survivors(scores, keep, floors, [groups] * layers)
    assert len(set(found)) == keep and list(found) == sorted(found)
    for layer, floor in enumerate(floors):
        own = [one - 8 * layer for one in found if one // 8 == layer]
        assert len(own) >= floor and tuple(own) == best_of(scores[layer], len(own), groups)
        counts = [sum(one // (8 // groups) == group for one in own) for group in range(groups)]
        assert max(counts) - min(counts) <= 1
        if groups == 1 and own and len(own) < 8:
            out = [e for e in range(8) if e not in own]
            assert min(scores[layer][own]) >= max(scores[layer][out])


def test_more_than_there_is_room_for_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 experts"):
        survivors([torch.ones(4), torch.ones(4)], 3, [2, 2], [1, 1])


def test_mone_is_the_formula_and_never_routed_experts_are_no_nan() -> None:
    tokens = routed(5)
    statistics, vectors = seen(tokens)
    wanted, means = [], []
    for gates, outputs, real in tokens:
        kept = [output for output, counts in zip(outputs, real, strict=True) if counts]
        mass = sum(gate for gate, counts in zip(gates, real, strict=True) if counts)
        spread, mean = 0.0, [0.0] * H
        for dimension in range(H if kept else 0):
            values = [output[dimension] for output in kept]
            mean[dimension] = sum(values) / len(values)
            spread += sum((v - mean[dimension]) ** 2 for v in values) / len(values)
        wanted.append(mass * math.sqrt(spread))
        means.append(mean)
    found = mone_score(scope_of([(statistics, vectors)]).layers[0])
    torch.testing.assert_close(
        found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-7
    )
    decision = METHODS["mone"].decide(scope_of([(statistics, vectors)]), 2)
    best = sorted(sorted(range(EXPERTS), key=lambda e: (-wanted[e], e))[:2])
    assert [expert.expert for expert in decision.prototypes] == best and not decision.rerouted
    rows = decision.constants[0]
    assert rows.shape == (3, H) and bool(rows.isfinite().all())
    for expert, slot in enumerate(decision.slots):
        assert (slot.constant is None) == (expert in best)
        if slot.constant is not None:
            torch.testing.assert_close(rows[slot.constant], torch.tensor(means[expert]))
    assert not rows[-1].any(), "the last expert was never chosen"


def test_vectors_wait_in_a_file(tmp_path: Path) -> None:
    _, vectors = seen(routed())
    vectors.save(tmp_path / "vectors.safetensors")
    back = OutputVectors.load(tmp_path / "vectors.safetensors")
    assert torch.equal(back.sums, vectors.sums) and torch.equal(back.squares, vectors.squares)
    (tmp_path / "vectors.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        OutputVectors.load(tmp_path / "vectors.safetensors")


# -- whole packages ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny("olmoe", folder)
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text("the quick brown fox jumps over it 0123456789 " * 30)
    return folder


def fit(source: Path, out: Path, method: str, rate: float, scope: int = 1) -> Path:
    api.fit(
        str(source),
        out,
        budget="4GB",
        device="cpu",
        rate=rate,
        scope=scope,
        method=method,
        calibration=source.parent / "text.txt",
        calibration_tokens=512,
    )
    return out


def logits_of(model, length: int = 12) -> Tensor:
    ids = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_nothing_removed_is_the_same_to_the_last_bit(source: Path, tmp_path: Path) -> None:
    plain = logits_of(api.load(fit(source, tmp_path / "conmoe", "conmoe", 0.0), device="cpu"))
    for method in ("reap", "man+drop", "mone"):
        package = fit(source, tmp_path / method, method, 0.0)
        assert load_manifest(package).rerouted == ()
        assert torch.equal(logits_of(api.load(package, device="cpu")), plain)


def test_opens_the_same_both_ways_and_generates(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    package = fit(source, tmp_path / "out", "man", 0.5)
    loaded = api.load(package, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(package)
    assert torch.equal(logits_of(loaded), logits_of(plain))
    assert torch.equal(logits_of(loaded, 1), logits_of(plain, 1)), "one token"
    prompt = torch.tensor([[5, 6, 7, 8]])
    outputs = [
        model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False).tolist()
        for model in (loaded, plain)
    ]
    assert outputs[0] == outputs[1]


def test_one_package_of_two_layers_a_scope(source: Path, tmp_path: Path) -> None:
    manifest = load_manifest(fit(source, tmp_path / "out", "reap", 0.5, scope=3))
    assert len(manifest.prototypes) == 12
    for layer in manifest.slots:
        assert sum(manifest.open_slots(layer)) >= 3
        for expert, slot in enumerate(manifest.slots[layer]):
            assert slot.prototype in (None, ExpertId(layer, expert))


def test_dropped_slots_add_nothing_where_the_router_is_left_alone(
    source: Path, tmp_path: Path
) -> None:
    """The reference: the original with the down projections of what was removed at zero."""
    from transformers import AutoModelForCausalLM

    package = fit(source, tmp_path / "out", "seer+drop", 0.5)
    manifest = load_manifest(package)
    assert manifest.rerouted == ()
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for layer, slots in manifest.slots.items():
        for expert, slot in enumerate(slots):
            if slot.prototype is None:
                with torch.no_grad():
                    reference.model.layers[layer].mlp.experts.down_proj[expert].zero_()
    torch.testing.assert_close(
        logits_of(api.load(package, device="cpu")), logits_of(reference), rtol=0, atol=2e-5
    )


def test_constants_stand_in_with_mone(source: Path, tmp_path: Path) -> None:
    """The reference: the original with an experts function that gives the mean for what was removed."""
    package = fit(source, tmp_path / "out", "mone", 0.5)
    manifest = load_manifest(package)
    constants = read_constants(package / CONSTANTS_FILE, SlotMap.of_manifest(manifest))
    assert all(len(rows) == 4 and bool(rows.isfinite().all()) for rows in constants.values())
    assert 0 < manifest.receipt["kl"] < 5
    for slots in manifest.slots.values():
        assert all((slot.prototype is None) != (slot.constant is None) for slot in slots)


def test_too_much_is_refused_before_anything_is_done(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        fit(source, tmp_path / "out", "reap", 0.75)
    error = caught.value
    assert "3" in error.why and "8" in error.why and "--rate 62.5%" in error.fix
    assert not list(tmp_path.iterdir())
    fit(source, tmp_path / "least", "reap", 0.625)
    fit(source, tmp_path / "drop", "reap+drop", 0.75)


def test_groups_lose_as_many_each(tmp_path: Path) -> None:
    """DeepSeek V3 opens one group of two and takes three slots of it."""
    folder = tmp_path / "source"
    save_tiny("deepseek_v3", folder)
    save_tokenizer(folder)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over it 0123456789 " * 30)
    with pytest.raises(UsageError, match="cannot remove") as caught:
        fit(folder, tmp_path / "out", "reap", 0.5)
    assert "1 of 2 groups" in caught.value.why and "--rate 25%" in caught.value.fix
    manifest = load_manifest(fit(folder, tmp_path / "out", "reap", 0.25))
    for layer in manifest.slots:
        is_open = manifest.open_slots(layer)
        assert sum(is_open[:4]) == sum(is_open[4:]) == 3


def test_routers_are_found_again_in_the_package(source: Path, tmp_path: Path) -> None:
    """The loss that the receipt gives is that of the original with its routers kept to the same slots."""
    from transformers import AutoModelForCausalLM

    package = fit(source, tmp_path / "out", "energy", 0.5)
    manifest = load_manifest(package)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    routers = find_routers(build_meta(read_config(str(source)), torch.float32))
    for layer, router in routers.items():
        own = router.__class__(
            router.path,
            reference.get_submodule(router.path),
            router.place,
            router.slots,
            router.selection,
        )
        reroute(own, manifest.open_slots(layer))
    torch.testing.assert_close(
        logits_of(api.load(package, device="cpu")), logits_of(reference), rtol=0, atol=2e-5
    )
