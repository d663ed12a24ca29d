"""Whole fits in which every prototype has the neurons and bits that it is worth: what is written, and that it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.format.records import form_of
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
from conmoe_edge.compress.quality.division import division_of
from conmoe_edge.errors import ResumeMismatch, UsageError
from conmoe_edge.integrations.load import load_package

SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 128, "head_dim": 16},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16},
}
"""The second keeps its matrices transposed, gate and up in turns, and has biases."""
BITS = 4.5


def prepare(family: str, folder: Path) -> Path:
    source = folder / "source"
    save_tiny(family, source, **SIZES[family])
    save_tokenizer(source)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 60)
    return source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("qwen3_moe", tmp_path_factory.mktemp("qwen"))


def fit(source: Path, out: Path, bits: float | None = BITS, **more: Any) -> Manifest:
    settings: dict[str, Any] = {"budget": "4GB", "device": "cpu", "calibration_tokens": 1024}
    text = source.parent / "text.txt"
    api.fit(str(source), out, bits=bits, calibration=text, **{**settings, **more})
    return load_manifest(out)


@pytest.fixture(scope="module")
def package(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "out"
    fit(source, out)
    return out


def nbytes_of(manifest: Manifest) -> int:
    return sum(manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes)


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
    fit(prepare("gpt_oss", tmp_path), tmp_path / "out", 6.0)
    check_records(tmp_path / "out")
    check_runs(tmp_path / "out")


def test_more_bits_lose_less_and_as_many_as_a_plain_form_takes_lose_less_than_it(
    source: Path, tmp_path: Path
) -> None:
    plain = fit(source, tmp_path / "plain", None, precision="q3", rate=0.0)
    weights = 8 * 3 * 64 * 128 * len(plain.slots)
    bits = nbytes_of(plain) * 8 / weights
    found = [fit(source, tmp_path / f"{one:g}", one) for one in (bits / 2, bits)]
    lost = [float(one.receipt["kl"]) for one in found]
    assert nbytes_of(found[1]) <= nbytes_of(plain)
    assert lost[1] < lost[0] and lost[1] < float(plain.receipt["kl"])


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    source: Path, package: Path, tmp_path: Path
) -> None:
    def stop(step: Any) -> None:
        if step.stage == "calibrate" and step.step == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(source, out, progress=stop)
    with pytest.raises(ResumeMismatch) as caught:
        fit(source, out, BITS + 1)
    assert "bits" in caught.value.why
    fit(source, out)
    names = sorted(path.name for path in package.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    for name in names:
        assert (package / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.parametrize("levers", [{"method": "conmoe"}, {"scope": 2}])
def test_methods_that_keep_whole_experts_cannot_have_it(
    source: Path, tmp_path: Path, levers: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as caught:
        fit(source, tmp_path / "out", **levers)
    assert "--method auto" in caught.value.fix
    assert not (tmp_path / "out").exists()
