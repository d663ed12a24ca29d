"""The hit curve against a direct replay of the trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from conmoe_edge.checkpoint.format.manifest import CacheSettings
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.offload.residency.policies import tables
from conmoe_edge.offload.simulate.load_settings import prototype_trace, read_trace
from conmoe_edge.offload.simulate.policy_search import replay
from conmoe_edge.report import hits
from conmoe_edge.report.hits import Hits, hit_curves, planned_slots, sampled

SIMPLE = {"lru": ("lru", 0.0), "lfru": ("lfru", 0.0), "pins 25%": ("pins", 0.25)}


def hits_of(package: Path) -> Hits:
    manifest = load_manifest(package)
    trace = read_trace(package, manifest)
    assert trace is not None
    told: list[tuple[int, int]] = []
    found = hit_curves(trace, manifest, lambda done, of: told.append((done, of)))
    assert found is not None
    assert told[-1][0] == told[-1][1] == len(told)
    return found


@pytest.mark.parametrize("name", ["scoped", "mixed"])
def test_every_point_is_a_replay(name: str, request: pytest.FixtureRequest) -> None:
    package = request.getfixturevalue(name)
    manifest = load_manifest(package)
    trace = read_trace(package, manifest)
    assert trace is not None
    asked = sampled(trace, manifest)
    found = hits_of(package).layouts
    assert len(found) == len(manifest.layouts)
    for layout, (curve, table) in enumerate(zip(found, tables(manifest), strict=True)):
        assert curve.precision == manifest.layouts[layout].precision
        assert curve.slots[-1] == curve.prototypes == len(table.members)
        members = set(table.members)
        mine = asked.only([n in members for n in range(len(manifest.prototypes))])
        rows = [row for _, row in mine.decode()]
        middle = sum(1 for _ in mine.decode(stop=mine.tokens // 2))
        assert set(SIMPLE) | {"layer-lru", "pins 50%"} == set(curve.rates)
        for column in (0, len(curve.slots) // 2, len(curve.slots) - 2):
            for policy, (kind, pins) in SIMPLE.items():
                settings = CacheSettings(curve.slots[column], kind, pins)
                hits, requests = replay(rows, settings, table, middle)
                assert curve.rates[policy][column] == pytest.approx(hits / requests)


def test_more_slots_never_hurt_the_best_and_all_of_them_miss_nothing(scoped: Path) -> None:
    (curve,) = hits_of(scoped).layouts
    assert list(curve.slots) == sorted(set(curve.slots))
    assert curve.best[-1] == 1.0
    assert all(one <= other + 0.01 for one, other in zip(curve.best, curve.best[1:], strict=False))
    for rates in curve.rates.values():
        assert len(rates) == len(curve.slots)


def test_planned_slots_are_on_the_grid(tight: Path, scoped: Path, by_hand: Path) -> None:
    manifest = load_manifest(tight)
    assert manifest.cache, "the budget is too small for all prototypes"
    for curve, one in zip(hits_of(tight).layouts, manifest.cache, strict=True):
        assert curve.planned == one.slots and one.slots in curve.slots
    assert planned_slots(load_manifest(scoped)) == [len(load_manifest(scoped).prototypes)]
    assert planned_slots(load_manifest(by_hand)) == [None]


def test_a_long_trace_is_sampled_by_whole_sequences(
    scoped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(scoped)
    trace = read_trace(scoped, manifest)
    assert trace is not None
    whole = prototype_trace(trace, manifest)
    monkeypatch.setattr(hits, "_MOST_REQUESTS", whole.requests)
    assert sampled(trace, manifest) == whole
    monkeypatch.setattr(hits, "_MOST_REQUESTS", whole.requests - 1)
    half = sampled(trace, manifest)
    assert half.sequences == whole.sequences[::2]
    assert half == whole.every(2) != whole


def test_all_layouts_together_are_the_sum_of_their_hits(mixed: Path, scoped: Path) -> None:
    manifest, found = load_manifest(mixed), hits_of(mixed)
    trace = read_trace(mixed, manifest)
    assert trace is not None
    asked, whole = sampled(trace, manifest), found.all_together
    counted = [n for layer in asked.asked for row in layer[asked.tokens // 2 :] for n in row]
    layout_of = [manifest.prototypes[n].layout for n in counted]
    parts = {(one.precision, n): at for one in found.layouts for at, n in enumerate(one.slots)}
    sizes = [layout.nbytes for layout in manifest.layouts]
    for column in range(len(whole.slots)):
        shares = [round(one.prototypes * (column + 1) / hits.POINTS) for one in found.layouts]
        if sum(shares) != whole.slots[column]:
            continue  # the planned point
        assert whole.nbytes[column] == sum(n * s for n, s in zip(shares, sizes, strict=True))
        rates = [
            one.best[parts[one.precision, n]] * layout_of.count(at) / len(counted)
            for at, (one, n) in enumerate(zip(found.layouts, shares, strict=True))
        ]
        assert whole.best[column] == pytest.approx(sum(rates))
    assert whole.best[-1] == 1.0 and whole.slots[-1] == len(manifest.prototypes)
    assert whole.planned == sum(one for one in planned_slots(manifest) if one is not None)
    # One layout alone is its own sum.
    (alone,), together = hits_of(scoped).layouts, hits_of(scoped).all_together
    assert (together.slots, together.rates) == (alone.slots, alone.rates)
