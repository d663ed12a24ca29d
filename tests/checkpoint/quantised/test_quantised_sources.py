"""Quantised checkpoints as sources: what a fit at rate 0 computes is what transformers computes from the same file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import save_tokenizer, tiny_model
from safetensors.torch import load_file, save_file

from conmoe_edge import api
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.errors import CheckpointError, ConmoeError, UnsupportedModel
from conmoe_edge.integrations.load import load_package

BLOCK = (16, 24)
"""Does not divide the sides of the experts' matrices: blocks at the edges are cut."""


def _rewrite(folder: Path, tensors: dict, quantised: dict | None) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if quantised is not None:
        config["quantization_config"] = quantised
    path.write_text(json.dumps(config))


def mxfp4_source(folder: Path) -> Path:
    """gpt-oss as it is published: blocks and scales for the experts, all else in bf16."""
    tiny_model("gpt_oss", dtype=torch.bfloat16, intermediate_size=64).save_pretrained(folder)
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    drawn = torch.Generator().manual_seed(3)
    for name in [one for one in tensors if one.endswith("_proj") and ".experts." in one]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (*shape, 16), generator=drawn, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            120, 124, shape, generator=drawn, dtype=torch.uint8
        )
    _rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


def fp8_source(
    folder: Path,
    block: tuple[int, int] | str = (8, 16),
    suffix: str = "_scale_inv",
    declared: bool = True,
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Qwen3-MoE with all linear layers in FP8, and what they are when each number is multiplied by its scale."""
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name in [one for one in tensors if one.endswith("_proj.weight")]:
        weight = tensors[name].float()
        rows, columns = weight.shape
        high, wide = {"tensor": (rows, columns), "channel": (1, columns)}.get(block, block)
        values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-rows // high), -(-columns // wide))
        exact = torch.empty(rows, columns, dtype=torch.bfloat16)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
                scales[i, j] = weight[part].abs().max() / 448
                values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
                exact[part] = (values[part].float() * scales[i, j]).bfloat16()
        tensors[name], plain[name] = values, exact
        tensors[name + suffix] = scales.reshape(()) if block == "tensor" else scales
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": []}
    if isinstance(block, tuple):
        settings["weight_block_size"] = list(block)
    _rewrite(folder, tensors, settings if declared else None)
    return folder, plain


def fit(source: Path, out: Path, rate: float | str = 0.0, precision: str = "auto") -> None:
    text = source.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    api.fit(
        str(source),
        out,
        budget="4GB",
        device="cpu",
        rate=rate,
        precision=precision,
        calibration=text,
        calibration_tokens=512,
    )


def logits(model) -> torch.Tensor:
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def by_transformers(folder: Path, config=None):
    from transformers import AutoModelForCausalLM

    more = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="eager", **more
    ).eval()


def assert_weights(package: Path, reference) -> None:
    """In fp32, where nothing but the order of sums differs, the package computes what the reference does."""
    loaded = load_package(package, device="cpu", dtype=torch.float32)
    found, wanted = logits(loaded), logits(reference.float())
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def assert_same_package(source: Path, plain: dict[str, torch.Tensor], work: Path) -> None:
    """A fit of the quantised model writes the bytes that one of its expanded copy writes."""
    copy = work / "copy"
    shutil.copytree(source, copy)
    config = json.loads((copy / "config.json").read_text())
    config.pop("quantization_config", None)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(plain, copy / "model.safetensors", {"format": "pt"})
    for rate in (0.0, 0.5):
        written = []
        for name, folder in (("own", source), ("copied", copy)):
            out = work / f"{name}-{rate}"
            fit(folder, out, rate, "bf16")
            manifest = open_package(out).manifest
            weights = {one.name: one.read_bytes() for one in sorted(out.glob("*.safetensors"))}
            written.append((weights, manifest.receipt, manifest.slots))
        assert len(written[0][0]) > 2
        assert written[0] == written[1]


def test_mxfp4_reads_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import Mxfp4Config

    from conmoe_edge.checkpoint.sources.locate import locate
    from conmoe_edge.model.opened import open_model

    source = mxfp4_source(tmp_path / "source")
    reference = by_transformers(source, Mxfp4Config(dequantize=True))
    with open_model(locate(str(source))).tensors() as tensors:
        expanded = {name: tensors[name][...] for name in tensors}
        for name in ("gate_up_proj", "down_proj"):
            full = f"model.layers.1.mlp.experts.{name}"
            wanted = reference.get_parameter(full)
            assert torch.equal(tensors[full][...], wanted)
            assert torch.equal(tensors[full][2:4], wanted[2:4])
            assert torch.equal(tensors[full][-1], wanted[-1])
    fit(source, tmp_path / "whole")
    assert_weights(tmp_path / "whole", reference)
    written = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "conmoe"
    plain = {
        name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()
    }
    for name in [one for one in plain if one.endswith(("_blocks", "_scales"))]:
        del plain[name]
        full = name.rsplit("_", 1)[0]
        plain[full] = expanded[full]
    assert_same_package(source, plain, tmp_path)


def test_fp8_blocks_read_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config

    source, plain = fp8_source(tmp_path / "source")
    config = FineGrainedFP8Config(weight_block_size=(8, 16), dequantize=True)
    reference = by_transformers(source, config)
    assert_reads(source, plain)
    fit(source, tmp_path / "whole")
    assert_weights(tmp_path / "whole", reference)
    assert_same_package(source, plain, tmp_path)


def assert_reads(source: Path, plain: dict[str, torch.Tensor]) -> None:
    from conmoe_edge.checkpoint.sources.locate import locate
    from conmoe_edge.model.opened import open_model

    with open_model(locate(str(source))).tensors() as tensors:
        assert set(tensors) == set(plain)
        for name, wanted in plain.items():
            assert torch.equal(tensors[name][...], wanted), name


@pytest.mark.parametrize("block", [BLOCK, "tensor", "channel"])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_every_layout_of_fp8_scales(block, suffix: str, tmp_path: Path) -> None:
    assert_reads(*fp8_source(tmp_path / "source", block, suffix))


def test_undeclared_fp8_is_expanded_and_never_cast(tmp_path: Path) -> None:
    assert_reads(*fp8_source(tmp_path / "source", "channel", "_scale", declared=False))


NAME = "model.layers.0.mlp.experts.3.up_proj.weight"


def _damaged(tensors: dict, how: str) -> None:
    scale = f"{NAME}_scale_inv"
    if how == "missing":
        del tensors[scale]
    elif how == "shape":
        tensors[scale] = tensors[scale][:1].clone()
    elif how == "zero":
        tensors[scale][0, 0] = 0
    elif how == "nan":
        tensors[scale][0, 0] = float("nan")
    elif how == "outer":
        tensors[f"{NAME}_scale_2"] = torch.ones(())
    elif how == "packed":
        del tensors[scale]
        tensors[NAME] = tensors[NAME].view(torch.uint8)


def test_scales_of_activations_and_of_the_cache_are_left_out(tmp_path: Path) -> None:
    """What they would round is not rounded here, and the weights are the same without them."""
    source, plain = fp8_source(tmp_path / "source", "tensor", "_scale")
    tensors = load_file(source / "model.safetensors")
    for name in ("self_attn.k_scale", "self_attn.v_proj.v_scale", "self_attn.q_proj.input_scale"):
        tensors[f"model.layers.0.{name}"] = torch.ones(1)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert_reads(source, plain)


def test_a_scale_of_zero_is_right_for_a_block_of_zeros(tmp_path: Path) -> None:
    source, plain = fp8_source(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    scale = f"{NAME}_scale_inv"
    tensors[NAME].view(torch.uint8)[:8, :16] = 0
    tensors[scale][0, 0] = 0
    plain[NAME][:8, :16] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert_reads(source, plain)


@pytest.mark.parametrize("how", ["missing", "shape", "zero", "nan", "outer", "packed"])
def test_what_cannot_be_right_is_refused_by_name(how: str, tmp_path: Path) -> None:
    source, _ = fp8_source(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    _damaged(tensors, how)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises((CheckpointError, UnsupportedModel), match=NAME) as caught:
        fit(source, tmp_path / "out")
    assert caught.value.why and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["awq", "gptq", "nonsense"])
def test_kinds_that_are_not_read_are_refused_by_name(method: str, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    _rewrite(tmp_path / "source", tensors, {"quant_method": method})
    with pytest.raises(ConmoeError, match=method):
        api.plan(str(tmp_path / "source"), budget="4GB", device="cpu")


def test_a_quantised_model_is_never_linked_for_another_engine(tmp_path: Path) -> None:
    """At its whole width as well it gets records: a link would be in the quantised form."""
    source, _ = fp8_source(tmp_path / "source")
    report = api.plan(str(source), budget="4GB", device="cpu", engine="hf")
    assert report.plan.chosen.rate == 0.0
    assert not report.plan.unchanged
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    out = tmp_path / "out"
    api.fit(
        str(source), out, budget="4GB", device="cpu", engine="hf", calibration=text,
        calibration_tokens=512,
    )  # fmt: skip
    manifest = open_package(out).manifest
    assert manifest.method == "auto"
    assert len(manifest.prototypes) == report.anatomy.expert_count
    assert logits(api.load(out, device="cpu")).isfinite().all()
