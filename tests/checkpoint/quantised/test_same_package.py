"""A fit of a quantised source and one of its expanded copy give the same records, byte for byte, and logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint.quantised.test_quantised_sources import fit, fp8_source, logits, mxfp4_source
from safetensors.torch import save_file

from conmoe_edge import api
from conmoe_edge.checkpoint.sources.locate import locate
from conmoe_edge.model.opened import open_model


def in_fp32(source: Path) -> Path:
    """The model computes, and quantised weights expand, in fp32: no rounding hides a difference."""
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}))
    return source


def expanded_copy(source: Path, folder: Path) -> Path:
    """The same model as a plain checkpoint, without a word of its quantisation."""
    shutil.copytree(source, folder)
    with open_model(locate(str(source))).tensors() as tensors:
        plain = {name: tensors[name][...].contiguous() for name in tensors}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    return folder


def records(package: Path) -> dict[str, bytes]:
    found = {
        str(one.relative_to(package)): one.read_bytes()
        for one in sorted(package.rglob("*"))
        if one.is_file() and one.suffix != ".json" and "receipt" not in one.name
    }
    assert found, sorted(one.name for one in package.iterdir())
    return found


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
def test_as_a_fit_of_the_expanded_copy(form: str, rate: float, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    source = in_fp32(mxfp4_source(folder) if form == "mxfp4" else fp8_source(folder)[0])
    plain = expanded_copy(source, tmp_path / "plain")
    fit(source, tmp_path / "a", rate)
    fit(plain, tmp_path / "b", rate)
    assert records(tmp_path / "a") == records(tmp_path / "b")
    found = logits(api.load(tmp_path / "a", device="cpu"))
    assert torch.equal(found, logits(api.load(tmp_path / "b", device="cpu")))
    assert found.isfinite().all()
