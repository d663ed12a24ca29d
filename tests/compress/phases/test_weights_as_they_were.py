"""Feedback and formats of the dense part touch nothing that stays in the checkpoint's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, save_tokenizer
from safetensors.torch import load_file

from conmoe_edge import api
from conmoe_edge.checkpoint.format.records import view
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.package.record_headers import record_name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny("qwen3_moe", folder, hidden_size=64, moe_intermediate_size=64, mlp_only_layers=[])
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    return folder


@pytest.mark.parametrize("kv", ["source", "int8"])
@pytest.mark.parametrize("precision", ["source", "bf16"])
@pytest.mark.parametrize("method", ["conmoe", "reap", "mone"])
def test_what_is_not_merged_has_the_bits_of_the_checkpoint(
    method: str, precision: str, kv: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    levers: dict[str, Any] = {"method": method, "rate": 0.5, "precision": precision}
    api.fit(
        str(source),
        out,
        budget="4GB",
        device="cpu",
        calibration=source.parent / "text.txt",
        calibration_tokens=512,
        dense_precision="source",
        kv_precision=kv,
        **levers,
    )
    manifest, original = load_manifest(out), load_file(source / "model.safetensors")
    written = {
        name: tensor
        for file in out.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    dense = {name: one for name, one in original.items() if ".mlp.experts." not in name}
    assert len(dense) > 20
    for name, tensor in dense.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    assert 0 < len(manifest.prototypes) < 3 * 8
    for entry in manifest.prototypes:
        record = view(manifest.layouts[entry.layout], written[record_name(entry.id)])
        prefix = f"model.layers.{entry.id.layer}.mlp.experts.{entry.id.expert}"
        matrices = [original[f"{prefix}.{one}_proj.weight"] for one in ("gate", "up", "down")]
        assert torch.equal(record["gate_up_proj"], torch.cat(matrices[:2]).to(wanted))
        assert torch.equal(record["down_proj"], matrices[2].to(wanted))
