"""``fit`` of a quantised model on the hub: the same package as from a folder, and every byte fetched once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tokenizer, tiny_model
from local_hub import Hub, folder_repository, local_hub
from safetensors.torch import load_file, save_file

from conmoe_edge import api

NAME = "org/quantised"
HEADERS = 1 << 17
"""Read of the one file before anything is decided."""
PEEKED = 1 << 14
"""More than what is read of small tensors that say how others are stored."""
LINEAR = "_proj.weight"
State = dict[str, torch.Tensor]


def mxfp4(tensors: State) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(3)
    for name in [one for one in tensors if one.endswith("_proj") and ".experts." in one]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=drawn)
        scales = torch.randint(120, 124, shape, generator=drawn)
        tensors[f"{name}_blocks"] = blocks.to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
    return {"quant_method": "mxfp4"}


def fp8(tensors: State) -> dict[str, Any]:
    for name in [one for one in tensors if one.endswith(LINEAR)]:
        weight = tensors[name].float()
        scales = weight.abs().amax(1, keepdim=True) / 448
        tensors[name] = (weight / scales).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scales
    return {"quant_method": "compressed-tensors", "format": "float-quantized"}


def nf4(tensors: State) -> dict[str, Any]:
    from bitsandbytes.functional import quantize_4bit

    for name in [one for one in tensors if one.endswith(LINEAR)]:
        packed, state = quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
        tensors[name] = packed
        parts = state.as_dict(packed=True)
        tensors.update({f"{name}.{part}": one for part, one in parts.items()})
    return {"quant_method": "bitsandbytes", "load_in_4bit": True}


KINDS = {"mxfp4": ("gpt_oss", mxfp4), "fp8": ("qwen3_moe", fp8), "nf4": ("qwen3_moe", nf4)}


def source_of(kind: str, folder: Path) -> Path:
    family, quantise = KINDS[kind]
    wide = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64}
    tiny_model(family, dtype=torch.bfloat16, **wide).save_pretrained(folder)
    save_tokenizer(folder)
    path, config = folder / "model.safetensors", folder / "config.json"
    tensors = dict(load_file(path))
    declared = quantise(tensors)
    save_file(tensors, path, {"format": "pt"})
    settings = {**json.loads(config.read_text()), "quantization_config": declared}
    config.write_text(json.dumps(settings))
    assert path.stat().st_size > 2 * HEADERS
    return folder


def fit(model: str, out: Path, text: Path, **more: Any) -> api.FitReport:
    return api.fit(
        model, out, budget="4GB", device="cpu", rate=0.5, method="conmoe", calibration=text,
        calibration_tokens=256, passes=1, **more,
    )  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json"):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(found) > 3
    return found


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_same_package_and_every_byte_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(kind, tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 012 " * 30)
    weights = (source / "model.safetensors").stat().st_size
    hub = Hub({NAME: folder_repository(source)})
    with local_hub(hub, tmp_path / "cache", monkeypatch):
        planned = api.plan(NAME, budget="4GB", device="cpu", rate=0.5)
        assert hub.weight_bytes() <= HEADERS + PEEKED
        hub.forget()
        report = fit(NAME, tmp_path / "parts", text)
        assert 0.9 * weights - HEADERS < hub.weight_bytes() <= weights + HEADERS + PEEKED
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
    fit(str(source), tmp_path / "local", text)
    assert digests(tmp_path / "parts") == digests(tmp_path / "local")
    local = api.plan(str(source), budget="4GB", device="cpu", rate=0.5)
    assert planned.anatomy == local.anatomy == report.plan.anatomy
