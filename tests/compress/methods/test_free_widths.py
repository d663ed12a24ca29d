"""A whole fit whose prototypes have different numbers of neurons: what is written, that it runs, and that it is the
same every time.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from free_fits import check_goes_on, check_same_bytes, fit, nbytes_of, prepare

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
from conmoe_edge.integrations.load import load_package

# Records of 3, 6, 9 and 12 pages for 16, 32, 48 and 64 neurons in fp32.
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
STEP = 3 * 4096
LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("qwen3_moe", tmp_path_factory.mktemp("free"), mlp_only_layers=[], **SIZES)


def fit_at(source: Path, out: Path, rate: float = 0.5, **more: Any) -> Manifest:
    return fit(source, out, rate=rate, calibration_tokens=2048, **more)


@pytest.fixture(scope="module")
def package(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "out"
    fit_at(source, out)
    return out


def widths_of(manifest: Manifest) -> list[int]:
    """Neurons of every prototype, by the shapes in its record."""
    width = [
        next(part.shape[1] for part in layout.parts if part.name == "down_proj")
        for layout in manifest.layouts
    ]
    return [width[entry.layout] for entry in manifest.prototypes]


def test_a_package_has_records_of_several_widths_in_the_bytes_that_were_planned(
    package: Path,
) -> None:
    manifest = load_manifest(package)
    verify_package(package, deep=True)
    counts = Counter(widths_of(manifest))
    assert len(manifest.layouts) == len(counts) >= 3 and set(counts) <= {16, 32, 48, 64}
    planned = manifest.plan["chosen"]["pool_bytes"]
    assert planned == LAYERS * 8 // 2 * 4 * STEP
    assert 0 <= planned - nbytes_of(manifest) < STEP
    assert len(manifest.prototypes) > LAYERS * 8 // 2, "more prototypes than whole ones would be"
    for layer, row in manifest.slots.items():
        own = {entry.id for entry in manifest.prototypes if entry.id.layer == layer}
        assert {slot.prototype for slot in row} - {None} <= own


def test_memory_changes_nothing_of_what_it_says(package: Path) -> None:
    """Each width has cache slots of its own; all of it resident, a few, and one slot each give the same tokens."""
    layouts = len(load_manifest(package).layouts)
    prompt = torch.tensor([[5, 9, 33, 12, 60, 61, 7, 8, 20]])
    seen = []
    for slots in (None, (3,) * layouts, (1,) * layouts):
        model = (
            api.load(package, device="cpu")
            if slots is None
            else load_package(package, device="cpu", slots=slots)
        )
        with torch.no_grad():
            logits = model(input_ids=prompt, use_cache=False).logits
            tokens = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
        seen.append((logits, tokens.tolist(), model.conmoe.stats().misses))
    assert seen[0][2] == 0 < seen[1][2] < seen[2][2]
    assert all(torch.equal(one[0], seen[0][0]) and one[1] == seen[0][1] for one in seen)


def test_the_same_fit_gives_the_same_bytes(source: Path, package: Path, tmp_path: Path) -> None:
    fit_at(source, tmp_path / "again")
    check_same_bytes(package, tmp_path / "again")


def test_equal_widths_give_one_layout(source: Path, tmp_path: Path) -> None:
    manifest = fit_at(source, tmp_path / "equal", widths="equal")
    assert len(manifest.layouts) == 1 and len(set(widths_of(manifest))) == 1
    assert nbytes_of(manifest) == manifest.plan["chosen"]["pool_bytes"]


def test_a_method_that_does_not_trim_has_one_layout_either_way(
    source: Path, tmp_path: Path
) -> None:
    found = [
        fit_at(source, tmp_path / widths, method="conmoe", widths=widths)
        for widths in ("free", "equal")
    ]
    assert all(widths_of(one) == [64] * (LAYERS * 8 // 2) for one in found)
    assert found[0].slots == found[1].slots


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_the_bytes_follow_the_rate(source: Path, tmp_path: Path, rate: float) -> None:
    manifest = fit_at(source, tmp_path / "out", rate)
    whole = LAYERS * 8 * 4 * STEP
    assert 0 <= manifest.plan["chosen"]["pool_bytes"] - nbytes_of(manifest) < STEP
    assert nbytes_of(manifest) <= (1 - rate) * whole


def test_a_run_goes_on_with_the_widths_that_it_began_with(source: Path, tmp_path: Path) -> None:
    levers = {"rate": 0.5, "calibration_tokens": 2048}
    manifest = check_goes_on(source, tmp_path / "out", "widths", "equal", **levers)
    assert len(manifest.layouts) >= 3
