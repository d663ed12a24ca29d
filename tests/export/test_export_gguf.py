"""GGUF files: llama.cpp loads them and computes what this runtime computes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import save_tiny, tiny_model
from hand_packages import identity, thirds, write_package
from llama import ask, llama_python, needs_llama
from small_tokenizers import make

import conmoe_edge
from conmoe_edge.compress.stream.calibration_text import CalibrationText, Document
from conmoe_edge.errors import OutputExists, UnsupportedModel, UsageError
from conmoe_edge.export.gguf import Quantisation, export_gguf
from conmoe_edge.export.llama.quantise import QuantisationFailed

PROMPT = [5, 9, 33, 12, 60, 61, 7, 8, 20]
FAMILIES = ("olmoe", "qwen3_moe", "gpt_oss")
WIDTH = {"qwen3_moe": "moe_intermediate_size"}
GPT_OSS_ROPE = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }
}
"""As gpt-oss has it, but for the bounds, which llama.cpp rounds."""
TEXT = "the quick brown fox jumps over the lazy dog " * 40


def sizes(family: str, **settings: Any) -> dict[str, Any]:
    """Sizes that llama.cpp's operators take."""
    width = WIDTH.get(family, "intermediate_size")
    found = {"vocab_size": 512, "num_key_value_heads": 4, width: 64, "mlp_only_layers": None}
    if family == "gpt_oss":
        found |= {"num_hidden_layers": 4, **GPT_OSS_ROPE}
    return {**found, **settings}


def by_hand(family: str, folder: Path, slots: Any = identity, **settings: Any) -> Path:
    """A package that no ``fit`` was needed for."""
    model = tiny_model(family, **sizes(family, **settings))
    package = write_package(model, folder, slots(model))
    make("byte-bpe").save_pretrained(package)
    return package


def fitted(family: str, folder: Path, rate: Any, **settings: Any) -> Path:
    path = save_tiny(family, folder / "source", **sizes(family, **settings))
    make("byte-bpe").save_pretrained(path)
    text = folder / "text.txt"
    text.write_text(TEXT)
    conmoe_edge.fit(
        str(path),
        folder / "package",
        budget="4GB",
        device="cpu",
        rate=rate,
        engine="gguf",
        calibration=text,
        calibration_tokens=512,
    )
    return folder / "package"


def check_same(package: Path, path: Path, steps: int = 64, within: float = 1e-4) -> None:
    """llama.cpp's greedy tokens are those of this runtime, and so are its logits, up to rounding."""
    found = ask(path, prompt=PROMPT, steps=steps)
    ids = torch.tensor([[*PROMPT, *found["tokens"]]])
    with torch.no_grad():
        logits = conmoe_edge.load(package, device="cpu")(ids).logits[0, :-1].float().numpy()
    assert logits[len(PROMPT) - 1 :].argmax(-1).tolist() == found["tokens"]
    np.testing.assert_allclose(found["logits"], logits, atol=within * np.abs(logits).max())


@needs_llama
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_gives_the_tokens_of_narrowed_experts(family: str, tmp_path: Path) -> None:
    package = fitted(family, tmp_path, 0.5)
    done = export_gguf(package, tmp_path / "out.gguf")
    assert (done.kind, done.width, done.experts) == ("materialised", 32, 8)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    name = {"olmoe": "feed_forward_length"}.get(family, "expert_feed_forward_length")
    arch = fields["general.architecture"].contents()
    assert fields[f"{arch}.{name}"].contents() == 32
    check_same(package, tmp_path / "out.gguf")


@needs_llama
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_gives_the_tokens_of_an_unchanged_model(family: str, tmp_path: Path) -> None:
    package = fitted(family, tmp_path, "auto")
    assert export_gguf(package, tmp_path / "out.gguf").kind == "unchanged"
    check_same(package, tmp_path / "out.gguf")


def yarn(**more: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            **more,
        }
    }


@needs_llama
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("olmoe", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("qwen3_moe", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
        ("gpt_oss", {"num_key_value_heads": 2, "head_dim": 16}),
        ("olmoe", yarn()),
        ("gpt_oss", yarn(beta_fast=16.0, beta_slow=2.0, truncate=True)),
        (
            "qwen3_moe",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 10000.0,
                    "factor": 2.0,
                }
            },
        ),
    ],
    ids=["shared-keys", "head-dim", "gpt-oss-head-dim", "yarn", "gpt-oss-yarn", "linear"],
)
def test_llama_computes_these_settings(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    package = by_hand(family, tmp_path / "package", thirds, **settings)
    export_gguf(package, tmp_path / "out.gguf")
    check_same(package, tmp_path / "out.gguf")


@needs_llama
def test_bf16_weights_are_the_same_numbers(tmp_path: Path) -> None:
    model = tiny_model("olmoe", dtype=torch.bfloat16, **sizes("olmoe"))
    package = write_package(model, tmp_path / "package", identity(model))
    make("byte-bpe").save_pretrained(package)
    export_gguf(package, tmp_path / "out.gguf")
    export_gguf(package, tmp_path / "wide.gguf", outtype="f32")
    narrow = ask(tmp_path / "out.gguf", prompt=PROMPT, steps=32)
    wide = ask(tmp_path / "wide.gguf", prompt=PROMPT, steps=32)
    assert narrow["tokens"] == wide["tokens"]
    held = {one.name: one for one in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    down = held["blk.1.ffn_down_exps.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.BF16
    values = torch.from_numpy(down.data.copy()).view(torch.bfloat16)
    wanted = model.model.layers[1].mlp.experts.down_proj
    assert torch.equal(values.view(wanted.shape), wanted)


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("olmoe", {"attention_bias": True}, "attention_bias = True"),
        ("olmoe", {"hidden_act": "gelu"}, "hidden_act = gelu"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias = True"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("olmoe", yarn(mscale=0.7), "mscale of yarn"),
        ("olmoe", yarn(attention_factor=2.0), "attention_factor = 2.0"),
        (
            "olmoe",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type = dynamic",
        ),
    ],
)
def test_what_llama_computes_otherwise_is_refused(
    family: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    package = by_hand(family, tmp_path / "package", **settings)
    with pytest.raises(UnsupportedModel, match=said):
        export_gguf(package, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_another_family_is_refused(tmp_path: Path) -> None:
    package = by_hand("mixtral", tmp_path / "package", intermediate_size=32)
    with pytest.raises(UnsupportedModel, match="mixtral is not written as GGUF"):
        export_gguf(package, tmp_path / "out.gguf")


@needs_llama
def test_rounded_bounds_of_yarn_are_said(tmp_path: Path) -> None:
    rope = {**GPT_OSS_ROPE["rope_parameters"], "truncate": False}
    package = by_hand("gpt_oss", tmp_path / "package", rope_parameters=rope)
    done = export_gguf(package, tmp_path / "out.gguf")
    assert any("rounds the two bounds of YaRN" in note for note in done.notes)
    check_same(package, tmp_path / "out.gguf", within=1e-2)
    with pytest.raises(AssertionError):
        check_same(package, tmp_path / "out.gguf")


def test_a_number_that_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny_model("olmoe", **sizes("olmoe"))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 4] = 1e6
    package = write_package(model, tmp_path / "package", identity(model))
    make("byte-bpe").save_pretrained(package)
    with pytest.raises(UnsupportedModel, match=r"blk.1.attn_q.weight holds numbers"):
        export_gguf(package, tmp_path / "out.gguf", outtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    package = by_hand("olmoe", tmp_path / "package")

    def stop(step: Any) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(package, tmp_path / "out.gguf", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    export_gguf(package, tmp_path / "out.gguf")
    with pytest.raises(OutputExists):
        export_gguf(package, tmp_path / "out.gguf")
    with pytest.raises(UsageError, match="is a folder"):
        export_gguf(package, package)
    export_gguf(package, tmp_path / "out.gguf", overwrite=True)


def quantisation(kind: str, *, weighed: bool) -> Quantisation:
    text = CalibrationText((Document("text", TEXT),), None, "")
    python = llama_python()
    assert python is not None
    return Quantisation(kind, text if weighed else None, 512, Path(python))


@needs_llama
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_file(family: str, tmp_path: Path) -> None:
    """Smaller, loads, and its logits are near those of the file that it was made of."""
    package = by_hand(family, tmp_path / "package")
    out, wide = tmp_path / "out.gguf", tmp_path / "wide.gguf"
    done = export_gguf(package, out, quantisation=quantisation("Q8_0", weighed=True))
    assert any("Q8_0 as llama.cpp makes it" in note for note in done.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "package"]
    export_gguf(package, wide)
    assert out.stat().st_size < 0.5 * wide.stat().st_size
    near, exact = (ask(path, prompt=PROMPT, steps=1)["logits"] for path in (out, wide))
    assert 0 < np.abs(near - exact).max() < 0.1 * np.abs(exact).max()


@needs_llama
def test_weighing_columns_changes_the_numbers(tmp_path: Path) -> None:
    package = by_hand("olmoe", tmp_path / "package")
    export_gguf(package, tmp_path / "a.gguf", quantisation=quantisation("Q4_0", weighed=True))
    export_gguf(package, tmp_path / "b.gguf", quantisation=quantisation("Q4_0", weighed=False))
    first, second = (
        {one.name: one for one in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("a.gguf", "b.gguf")
    )
    for name in ("blk.1.attn_q.weight", "blk.2.ffn_up_exps.weight", "blk.2.ffn_down_exps.weight"):
        assert first[name].data.tobytes() != second[name].data.tobytes()


@needs_llama
def test_numbers_from_mxfp4_blocks_stay_as_they_are(tmp_path: Path) -> None:
    """gpt-oss has its experts so; ``MXFP4_MOE`` finds the same numbers again."""
    model = tiny_model("gpt_oss", **sizes("gpt_oss"))
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

    def blocks(weight: torch.Tensor) -> torch.Tensor:
        """[E, in, out]: blocks of 32 inputs, each with a power of two of its own."""
        experts, inputs, outputs = weight.shape
        picked = torch.randint(0, 8, weight.shape, generator=generator)
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        powers = torch.randint(-6, -2, (experts, inputs // 32, 1, outputs), generator=generator)
        scale = (2.0**powers).expand(-1, -1, 32, -1).reshape(weight.shape)
        return grid[picked] * signs * scale

    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(layer.mlp.experts, name)
                weight.copy_(blocks(weight))
    package = write_package(model, tmp_path / "package", identity(model))
    make("byte-bpe").save_pretrained(package)
    out = tmp_path / "out.gguf"
    export_gguf(package, out, quantisation=quantisation("MXFP4_MOE", weighed=True))
    held = {one.name: one for one in gguf.GGUFReader(out).tensors}
    experts = model.model.layers[1].mlp.experts
    for name, wanted in {
        "ffn_down_exps": experts.down_proj,
        "ffn_gate_exps": experts.gate_up_proj[..., 0::2],
        "ffn_up_exps": experts.gate_up_proj[..., 1::2],
    }.items():
        found = held[f"blk.1.{name}.weight"]
        assert found.tensor_type == gguf.GGMLQuantizationType.MXFP4
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        np.testing.assert_array_equal(values, wanted.detach().transpose(1, 2).numpy())


@needs_llama
def test_what_llama_says_of_a_shape_is_passed_on(tmp_path: Path) -> None:
    package = by_hand("olmoe", tmp_path / "package", hidden_size=256, num_hidden_layers=1)
    asked = quantisation("IQ2_XXS", weighed=False)
    with pytest.raises(QuantisationFailed, match="did not quantise to IQ2_XXS") as caught:
        export_gguf(package, tmp_path / "out.gguf", quantisation=asked)
    assert "requires an imatrix" in caught.value.why
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_without_the_library_the_command_that_gets_it_is_named(tmp_path: Path) -> None:
    package = by_hand("olmoe", tmp_path / "package")
    absent = Quantisation("Q8_0", python=tmp_path / "nothing")
    with pytest.raises(UsageError) as caught:
        export_gguf(package, tmp_path / "out.gguf", quantisation=absent)
    assert "--llama-python" in caught.value.fix
    without = tmp_path / "python"  # an interpreter that has nothing but the standard library
    without.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    without.chmod(0o755)
    with pytest.raises(UsageError, match="has no llama-cpp-python") as caught:
        export_gguf(package, tmp_path / "o.gguf", quantisation=Quantisation("Q8_0", python=without))
    assert "-m pip install llama-cpp-python" in caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package", "python"]
