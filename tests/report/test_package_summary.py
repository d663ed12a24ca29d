"""The facts of real packages, against their manifests."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from conmoe_edge.checkpoint.format.manifest import PREDICTOR_FILE, ROUTING_FILE
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, save_manifest
from conmoe_edge.errors import PackageError, UsageError
from conmoe_edge.offload.simulate.load_settings import read_trace
from conmoe_edge.offload.simulate.machine_file import MACHINE_FILE
from conmoe_edge.report.package_summary import memory_terms, summarise, to_json
from conmoe_edge.report.reduction import reduction_words
from conmoe_edge.report.slot_shares import quantile

from .conftest import without_overview

PACKAGES = ("scoped", "auto", "mixed", "tight")


@pytest.fixture
def package(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("package", PACKAGES, indirect=True)
def test_slots_and_prototypes_are_those_of_the_manifest(package: Path) -> None:
    facts, manifest = summarise(package), load_manifest(package)
    assert facts.name == "demo" and facts.model_type == "olmoe" and facts.top_k == 4
    for layer, row in manifest.slots.items():
        for number, (slot, fact) in enumerate(zip(row, facts.slots[layer], strict=True)):
            assert fact.prototype == slot.prototype and fact.scale == slot.scale
            own = slot.prototype == (layer, number)
            assert fact.kind == ("prototype" if own else "alias")
            assert (fact.distance == 0.0) if own else 0 < (fact.distance or 0) <= 2
    leading = Counter(slot.prototype for row in manifest.slots.values() for slot in row)
    assert {one.id: one.slots for one in facts.prototypes} == dict(leading)
    assert sum(slot.share or 0 for slot in facts.every_slot) == pytest.approx(1, abs=1e-4)
    # What a prototype carries is what its slots had.
    for one in facts.prototypes:
        shares = [s.share or 0 for s in facts.every_slot if s.prototype == one.id]
        assert one.weight == pytest.approx(sum(shares), rel=1e-4)
    assert facts.busiest(3)[0].weight == max(one.weight for one in facts.prototypes)
    assert facts.loneliest(3)[0].weight == min(one.weight for one in facts.prototypes)


def test_each_kind_of_slot_and_no_figures_where_nothing_is_known(by_hand: Path) -> None:
    facts = summarise(by_hand, curves=True)
    assert facts.counts() == {"prototype": 108, "alias": 6, "constant": 3, "dropped": 3}
    assert facts.usage is None and facts.hits is None and facts.plan is None
    assert {slot.share for slot in facts.every_slot} == {None}
    assert memory_terms(facts) == () and facts.distances == ()
    value = to_json(facts)
    assert value["memory"] is None and value["distances"] is None and value["cache"] == []


def test_an_older_package_counts_the_choices_of_its_trace(scoped: Path, tmp_path: Path) -> None:
    facts = summarise(without_overview(scoped, tmp_path / "old"))
    trace = read_trace(scoped, load_manifest(scoped))
    assert trace is not None and facts.usage is not None and facts.usage.source == "trace"
    chosen = [slot for row in trace.slots[2] for slot in row]
    layer = trace.layers[2]
    for fact in facts.slots[layer]:
        assert fact.tokens == chosen.count(fact.id.expert)
    assert sum(slot.share or 0 for slot in facts.every_slot) == pytest.approx(1)
    assert all(s.distance is None for s in facts.every_slot if s.kind == "alias")


def test_without_a_trace_there_are_neither_curves_nor_shares(scoped: Path, tmp_path: Path) -> None:
    folder = without_overview(scoped, tmp_path / "old")
    manifest = load_manifest(folder)
    gone = {ROUTING_FILE, PREDICTOR_FILE}
    files = {name: one for name, one in manifest.files.items() if name not in gone}
    save_manifest(folder, replace(manifest, files=files, prefetch=None))
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    facts = summarise(folder, curves=True)
    assert facts.usage is None and facts.hits is None and facts.top_k is None


@pytest.mark.parametrize("package", (*PACKAGES, "unchanged"), indirect=True)
def test_planned_memory_adds_up_and_sizes_are_those_on_disk(package: Path) -> None:
    facts = summarise(package)
    assert facts.plan is not None
    terms = memory_terms(facts)
    assert sum(term.planned for term in terms) == facts.plan.device_bytes_used
    on_disk = sum(path.stat().st_size for path in package.iterdir())
    sizes = facts.sizes
    known = sizes.dense + sizes.prototypes + sizes.other
    unlisted = ("conmoe.json", MACHINE_FILE)
    assert known == on_disk - sum((package / name).stat().st_size for name in unlisted)
    # Headers are all that the plan does not count.
    assert sizes.dense + sizes.prototypes == pytest.approx(facts.plan.disk_bytes, rel=0.01)


def test_scopes_are_the_layers_that_share(scoped: Path, auto: Path) -> None:
    assert summarise(scoped).scopes == ((0, 1), (2, 3), (4, 5))
    assert summarise(auto).scopes == ((0,), (1,), (2,), (3,), (4,), (5,))


@pytest.mark.parametrize("package", (*PACKAGES, "unchanged", "by_hand"), indirect=True)
def test_the_json_is_json(package: Path) -> None:
    value = json.loads(json.dumps(to_json(summarise(package)), allow_nan=False))
    assert value["slots"]["prototypes"] == len(value["prototypes"])
    assert sum(len(one["slots"]) for one in value["layers"]) == sum(
        value["slots"][kind] for kind in ("own", "alias", "constant", "dropped")
    )


def test_a_changed_file_is_found(scoped: Path, tmp_path: Path) -> None:
    folder = without_overview(scoped, tmp_path / "copy")
    assert summarise(folder, verify=True).verified
    data = bytearray((folder / ROUTING_FILE).read_bytes())
    data[-1] ^= 1
    (folder / ROUTING_FILE).unlink()
    (folder / ROUTING_FILE).write_bytes(data)
    assert not summarise(folder).verified  # of the same size: nothing to be seen without hashing
    with pytest.raises(PackageError, match="damaged"):
        summarise(folder, verify=True)
    (folder / ROUTING_FILE).unlink()
    with pytest.raises(PackageError, match="incomplete"):
        summarise(folder)


def bench_report(**changes: object) -> dict[str, object]:
    return {
        "package": {"method": "conmoe", "rate": 0.5, "prototypes": 96, "slots": 40},
        "decode": {"tokens_per_second": {"median": 12.5, "low": 1, "high": 2}, "hit_rate": 0.75},
        "memory": {"used_bytes": 500_000_000, "budget_bytes": 600_000_000},
        **changes,
    }


def test_what_bench_measured_is_taken_in(scoped: Path, tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(bench_report()), encoding="utf-8")
    value = to_json(summarise(scoped, bench=path))
    assert value["speed"]["measured_tokens_per_second"] == 12.5
    assert value["memory"]["measured_bytes"] == 500_000_000


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no report of bench"),
        ("[1]", "no report of bench"),
        (json.dumps(bench_report(memory={})), "no report of bench"),
        (json.dumps({"package": {}}), "no report of bench"),
        (
            json.dumps(
                bench_report(package={"method": "auto", "rate": 0.5, "prototypes": 96, "slots": 1})
            ),
            "another package",
        ),
    ],
)
def test_a_report_of_something_else_is_refused(
    text: str, what: str, scoped: Path, tmp_path: Path
) -> None:
    path = tmp_path / "speed.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        summarise(scoped, bench=path)
    assert what in caught.value.what and "bench DIR --json" in caught.value.fix
    with pytest.raises(UsageError, match="cannot be read"):
        summarise(scoped, bench=tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("values", "share", "wanted"),
    [
        ([1.0], 0.5, 1.0),
        ([1.0, 2.0], 0.5, 1.0),
        ([1.0, 2.0, 3.0], 0.5, 2.0),
        ([3.0, 1.0], 1.0, 3.0),
    ],
)
def test_quantiles(values: list[float], share: float, wanted: float) -> None:
    assert quantile(values, share) == wanted


@pytest.mark.parametrize("package", PACKAGES, indirect=True)
def test_what_was_taken_adds_up(package: Path) -> None:
    facts, value = summarise(package), to_json(summarise(package))
    manifest, removed = load_manifest(package), facts.reduction
    demo = (32 * 6, 3 * 96 * 192)  # experts, and weights of one
    assert (removed.experts, removed.kept) == (demo[0], len(manifest.prototypes))
    assert removed.bytes_before == 2 * demo[0] * demo[1]
    assert removed.bytes_now == sum(manifest.layouts[p.layout].nbytes for p in manifest.prototypes)
    assert removed.bits_before == 16 and removed.bits_now == pytest.approx(
        8 * removed.bytes_now / (demo[0] * demo[1])
    )
    assert removed.removed == pytest.approx(1 - removed.bytes_now / removed.bytes_before)
    layers = facts.layers.values()
    assert sum(one.nbytes for one in layers) == removed.bytes_now
    assert sum(one.bytes_before or 0 for one in layers) == removed.bytes_before
    assert sum(one.prototypes for one in layers) == removed.kept
    assert value["experts"]["removed"] == removed.removed
    words = reduction_words(removed)
    assert f"{100 * (removed.removed or 0):.0f} % less" in words[1]
    assert f"{removed.kept:,} of 192 experts" in words[0] or removed.kept == 192


def test_the_survey_is_kept_where_there_was_one(auto: Path, scoped: Path) -> None:
    facts = summarise(auto)
    shares = [one.worth for one in facts.layers.values()]
    assert all(one is not None for one in shares) and sum(shares) == pytest.approx(1)  # type: ignore[arg-type]
    assert len(set(shares)) > 1
    assert facts.reduction.narrower and {one.whole for one in facts.prototypes} == {96}
    kept = sum(one.neurons for one in facts.prototypes) / (192 * 96)
    assert facts.reduction.weights_share == pytest.approx(kept)
    assert {one.worth for one in summarise(scoped).layers.values()} == {None}


def test_packages_from_before_say_less(scoped: Path, tmp_path: Path) -> None:
    folder = without_overview(scoped, tmp_path / "old")
    save_manifest(folder, replace(load_manifest(folder), originals={}))
    removed = summarise(folder).reduction
    assert removed.removed is None and removed.narrower is None and removed.bits_now is None
    assert reduction_words(removed) == ["96 of 192 experts are kept"]
