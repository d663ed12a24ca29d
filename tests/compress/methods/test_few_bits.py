"""Whole fits in 4, 3 and 2 bits: what is written, what it is worth beside plain rounding, and that it runs."""

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
from conmoe_edge.integrations.load import load_package

SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16},
}
"""The second keeps its matrices transposed, gate and up in turns, and has biases."""


@pytest.fixture(scope="module", params=sorted(SIZES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "source"
    save_tiny(request.param, folder, **SIZES[request.param])
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog 0123456789 " * 60
    )
    return folder


def fit(source: Path, out: Path, precision: str, rate: float = 0.0, **more: Any) -> Manifest:
    api.fit(
        str(source),
        out,
        budget="4GB",
        device="cpu",
        precision=precision,
        rate=rate,
        calibration=source.parent / "text.txt",
        calibration_tokens=2048,
        **more,
    )
    return load_manifest(out)


def kl(manifest: Manifest) -> float:
    assert manifest.receipt is not None
    return float(manifest.receipt["kl"])


@pytest.mark.parametrize("precision", ["q4", "q3", "q2"])
def test_every_weight_is_in_few_bits_and_less_is_lost_than_by_rounding(
    source: Path, precision: str, tmp_path: Path
) -> None:
    found = fit(source, tmp_path / "auto", precision)
    verify_package(tmp_path / "auto", deep=True)
    for layout in found.layouts:
        assert [form_of(layout, name) for name in ("gate_up_proj", "down_proj")] == [precision] * 2
    rounded = fit(source, tmp_path / "rounded", precision, method="conmoe")
    assert kl(found) < 0.7 * kl(rounded)


def test_fewer_neurons_in_fewer_bits(source: Path, tmp_path: Path) -> None:
    """Narrow prototypes too; and memory changes nothing of what the package says."""
    manifest = fit(source, tmp_path / "out", "q3", 0.5)
    assert manifest.plan is not None
    planned = manifest.plan["chosen"]["pool_bytes"]
    written = sum(manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes)
    assert written <= planned
    prompt = torch.tensor([[5, 9, 33, 12, 60, 61, 7, 8, 20]])
    seen = []
    for slots in (None, (1,) * len(manifest.layouts)):
        model = load_package(tmp_path / "out", device="cpu", slots=slots)
        with torch.no_grad():
            seen.append(model(input_ids=prompt, use_cache=False).logits)
    assert torch.equal(*seen)


def test_the_same_fit_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        fit(source, tmp_path / name, "q3", 0.25)
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
