"""Bytes of the experts' part of a package: those that were asked for in bits, to one per cent, and none more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from free_fits import fit, prepare

from conmoe_edge import api
from conmoe_edge.plan.record_options import bytes_of_bits

SIZES = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_experts": 24,
    "head_dim": 32,
    "mlp_only_layers": [],
}
BITS = (2.31, 3.06, 5.0)


def expert_part(folder: Path) -> int:
    """Of files: records with their headers, constants; of the manifest: the map with its scales."""
    manifest = json.loads((folder / "conmoe.json").read_text())
    told = sum(len(json.dumps(manifest[one])) for one in ("remap", "scales", "constants"))
    files = [*folder.glob("prototypes-*.safetensors"), *folder.glob("constants.safetensors")]
    return told + sum(file.stat().st_size for file in files)


def check(source: str, out: Path, bits: float) -> None:
    manifest = json.loads((out / "conmoe.json").read_text())
    anatomy = api.plan(source, budget="4GB", device="cpu").anatomy
    asked = bytes_of_bits(anatomy, bits)
    assert manifest["plan"]["chosen"]["bits"] == pytest.approx(bits, abs=1e-4)
    assert 0.99 <= expert_part(out) / asked <= 1.002


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("qwen3_moe", tmp_path_factory.mktemp("bytes"), **SIZES)


@pytest.mark.parametrize("bits", BITS)
def test_a_tiny_model_takes_the_bytes_that_were_asked_for(
    source: Path, tmp_path: Path, bits: float
) -> None:
    fit(source, tmp_path / "out", bits=bits, passes=1)
    check(str(source), tmp_path / "out", bits)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_the_demo_takes_the_bytes_that_were_asked_for(tmp_path: Path, bits: float) -> None:
    out = tmp_path / "out"
    api.fit("demo", out, bits=bits, budget="2GiB", device="cpu", passes=1, calibration_tokens=4096)
    check("demo", out, bits)
