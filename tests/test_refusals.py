"""What cannot be done costs one clear error, and nothing is written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from families import save_tiny, save_tokenizer
from safetensors.torch import load_file, save_file

from conmoe_edge import api
from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.errors import (
    CalibrationError,
    CheckpointError,
    ConmoeError,
    NoSpace,
    UnsupportedModel,
    UsageError,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    save_tiny("olmoe", folder)
    save_tokenizer(folder)
    return folder


def refused(source: Path, kind: type[ConmoeError], **levers: object) -> ConmoeError:
    """Fit must raise ``kind``, and leave the folder beside the source as it was."""
    out = source.parent / "out"
    before = sorted(path.name for path in source.parent.iterdir())
    settings = {"budget": "4GB", "device": "cpu", "rate": 0.5, "calibration_tokens": 512, **levers}
    with pytest.raises(kind) as error:
        api.fit(str(source), out, **settings)
    assert not out.exists()
    assert error.value.what and "\n" not in str(error.value)
    left = [path.name for path in source.parent.iterdir() if path.name not in before]
    assert all(name.startswith(".out.partial-") for name in left)
    return error.value


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def test_dense_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "source"
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    assert "dense" in refused(folder, UnsupportedModel).what


def test_experts_with_gated_input(source: Path) -> None:
    edit_config(source, model_type="llama4_text")
    assert "input of an expert" in refused(source, UnsupportedModel).why


def test_unknown_architecture(source: Path) -> None:
    edit_config(source, model_type="something_new", auto_map={"AutoConfig": "evil.Config"})
    (source / "evil.py").write_text(f"open({str(source.parent / 'ran')!r}, 'w')")
    refused(source, UnsupportedModel)
    assert not (source.parent / "ran").exists()


def test_code_beside_a_known_model_is_not_run(source: Path) -> None:
    edit_config(
        source, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    )
    (source / "evil.py").write_text(f"open({str(source.parent / 'ran')!r}, 'w')")
    out = source.parent / "out"
    api.fit(str(source), out, budget="4GB", device="cpu", rate=0.5, calibration_tokens=512)
    assert not (source.parent / "ran").exists()
    assert not (out / "evil.py").exists() and "auto_map" not in json.loads(
        (out / "config.json").read_text()
    )


def test_quantised_already(source: Path) -> None:
    edit_config(source, quantization_config={"quant_method": "mxfp4"})
    assert "mxfp4" in refused(source, UnsupportedModel).what


def test_pickled_weights(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "pickle" in refused(source, CheckpointError).why


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers(source: Path, name: str, value: float) -> None:
    tensor = load_file(source / "model.safetensors")[name]
    tensor[0, 0] = value
    edit_weights(source, name, tensor)
    error = refused(source, CheckpointError)
    assert "NaN" in error.what and "model.layers.1." in error.what
    assert name.rsplit(".", 2)[1].replace("up_proj", "gate_up_proj") in error.what


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.norm.weight",
    ],
)
def test_missing_tensor(source: Path, name: str) -> None:
    edit_weights(source, name, None)
    refused(source, CheckpointError)


def test_weights_of_another_shape(source: Path) -> None:
    edit_weights(source, "model.layers.1.self_attn.q_proj.weight", torch.zeros(3, 5))
    refused(source, CheckpointError)


def test_truncated_shard_and_bad_index(source: Path) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(source, CheckpointError)
    for shard in ("../model.safetensors", "/etc/passwd", "missing.safetensors"):
        (source / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": shard}})
        )
        refused(source, CheckpointError)


def test_damaged_config_and_tokenizer(source: Path) -> None:
    tokenizer = (source / "tokenizer.json").read_bytes()
    (source / "tokenizer.json").write_bytes(tokenizer[:100])
    refused(source, CalibrationError)
    (source / "tokenizer.json").write_bytes(tokenizer)
    edit_config(source, hidden_size="large")
    refused(source, CheckpointError)
    (source / "config.json").write_text("{")
    refused(source, CheckpointError)


def test_levers_out_of_range(source: Path) -> None:
    for levers in (
        {"rate": 1.0},
        {"rate": -0.1},
        {"scope": 0},
        {"method": "magic"},
        {"precision": "int3"},
        {"budget": "12"},
    ):
        refused(source, UsageError, **levers)
    refused(source, CalibrationError, calibration=source / "none.txt")


def test_full_disk_is_told_before_anything_is_done(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 16))
    assert "needed" in refused(source, NoSpace).why


def test_disk_that_becomes_full_is_a_stop_and_the_run_goes_on(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levers = {"budget": "4GB", "device": "cpu", "rate": 0.5, "calibration_tokens": 512}
    whole = source.parent / "whole"
    api.fit(str(source), whole, **levers)
    steps = 0
    fsync = durable.fsync_file

    def full(path: Path) -> None:
        nonlocal steps
        steps += 1
        if steps == 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(path)

    monkeypatch.setattr(durable, "fsync_file", full)
    refused(source, NoSpace)
    monkeypatch.setattr(durable, "fsync_file", fsync)
    out = source.parent / "out"
    api.fit(str(source), out, **levers)
    for path in sorted(whole.iterdir()):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_damaged_package_is_not_loaded(source: Path) -> None:
    out = source.parent / "out"
    api.fit(str(source), out, budget="4GB", device="cpu", rate=0.5, calibration_tokens=512)
    for name in (
        "prototypes-00001.safetensors",
        "dense-00001-of-00001.safetensors",
        "config.json",
        "conmoe.json",
    ):
        broken = source.parent / f"broken-{name}"
        shutil.copytree(out, broken)
        data = (broken / name).read_bytes()
        (broken / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError):
            api.load(broken, device="cpu")
