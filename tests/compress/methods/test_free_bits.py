"""Whole fits in which every prototype has the neurons and bits that it is worth: what is written, and that it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from free_fits import check_goes_on, check_same_bytes, fit, nbytes_of, prepare

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest
from conmoe_edge.checkpoint.format.records import form_of
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
from conmoe_edge.compress.quality.division import division_of
from conmoe_edge.errors import UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.plan.record_options import beside_bytes

SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 128, "head_dim": 16},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16},
}
"""The second keeps its matrices transposed, gate and up in turns, and has biases."""
BITS = 4.5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("qwen3_moe", tmp_path_factory.mktemp("qwen"), **SIZES["qwen3_moe"])


@pytest.fixture(scope="module")
def package(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "out"
    fit(source, out, bits=BITS)
    return out


def check_records(folder: Path) -> Manifest:
    """Forms are what the kinds say, and there are several; no more bytes than planned, less than a record left."""
    manifest = load_manifest(folder)
    verify_package(folder, deep=True)
    for layout in manifest.layouts:
        inputs, _, down = layout.precision.partition("-")
        pair = form_of(layout, "gate_up_proj"), form_of(layout, "down_proj")
        assert pair == (inputs, down or inputs)
    left = manifest.plan["chosen"]["pool_bytes"] - nbytes_of(manifest)
    assert 0 <= left < max(layout.nbytes for layout in manifest.layouts)
    for layer, row in manifest.slots.items():
        for number, slot in enumerate(row):
            assert (slot.constant is None) == (slot.prototype == ExpertId(layer, number))
    return manifest


def check_runs(folder: Path) -> None:
    """Memory changes nothing of what a package says."""
    layouts = len(load_manifest(folder).layouts)
    prompt, seen = torch.tensor([[5, 9, 33, 12, 60, 61, 7, 8, 20]]), []
    for slots in (None, (1,) * layouts):
        model = load_package(folder, device="cpu", slots=slots)
        with torch.no_grad():
            seen.append(model(input_ids=prompt, use_cache=False).logits)
    assert torch.equal(*seen)


def test_prototypes_have_several_kinds_in_the_bytes_that_were_asked_for(package: Path) -> None:
    manifest = check_records(package)
    assert manifest.precision == "free" and manifest.rate == 0
    assert len({layout.precision for layout in manifest.layouts}) >= 2
    assert manifest.plan["chosen"]["bits"] == pytest.approx(BITS, abs=0.01)
    division = division_of(manifest, transposed=False)
    assert sum(one.prototypes for one in division) == len(manifest.prototypes)
    assert sum(one.nbytes for one in division) == nbytes_of(manifest)
    assert sum(one.weight for one in division) == pytest.approx(1.0)
    sizes = [one.nbytes / one.prototypes for one in division]
    assert sizes == sorted(sizes, reverse=True)
    assert {one.width for one in division} <= {32, 64, 96, 128}
    check_runs(package)


def test_experts_with_biases_and_transposed_matrices(tmp_path: Path) -> None:
    fit(prepare("gpt_oss", tmp_path, **SIZES["gpt_oss"]), tmp_path / "out", bits=6.0)
    check_records(tmp_path / "out")
    check_runs(tmp_path / "out")


def test_more_bits_lose_less_and_as_many_as_a_plain_form_takes_lose_less_than_it(
    source: Path, tmp_path: Path
) -> None:
    plain = fit(source, tmp_path / "plain", precision="q3", rate=0.0)
    weights = 8 * 3 * 64 * 128 * len(plain.slots)
    beside = beside_bytes(api.plan(str(source), budget="4GB", device="cpu").anatomy)
    bits = (nbytes_of(plain) + beside) * 8 / weights
    found = [fit(source, tmp_path / f"{one:g}", bits=one) for one in (bits / 2, bits)]
    lost = [float(one.receipt["kl"]) for one in found]
    assert nbytes_of(found[1]) <= nbytes_of(plain)
    assert lost[1] < lost[0] and lost[1] < float(plain.receipt["kl"])


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    source: Path, package: Path, tmp_path: Path
) -> None:
    check_goes_on(source, tmp_path / "out", "bits", BITS + 1, bits=BITS)
    check_same_bytes(package, tmp_path / "out")


@pytest.mark.parametrize("levers", [{"method": "conmoe"}, {"scope": 2}])
def test_methods_that_keep_whole_experts_cannot_have_it(
    source: Path, tmp_path: Path, levers: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as caught:
        fit(source, tmp_path / "out", bits=BITS, **levers)
    assert "--method auto" in caught.value.fix
    assert not (tmp_path / "out").exists()
