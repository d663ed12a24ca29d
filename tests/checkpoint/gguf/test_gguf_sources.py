"""GGUF files as sources: the model that they were made from comes out of them, expanded as the library expands it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import (
    ARCHITECTURES,
    all_of,
    fields_of,
    gguf_tensors,
    plain_model,
    write_gguf,
)
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conmoe_edge import api
from conmoe_edge.checkpoint.gguf.expanded import GgufTensors
from conmoe_edge.checkpoint.gguf.opened import open_gguf
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.checkpoint.sources.locate import locate
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.errors import CheckpointError, ConmoeError, UnsupportedModel
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.opened import open_model

TEXT = "the quick brown fox jumps over the lazy dog 0123456789 " * 40


def source(kind: str, folder: Path, typed: Any = None, **sizes: Any) -> tuple[Path, Any, dict]:
    """A GGUF file, the config of its model, and the tensors of the plain checkpoint as the file has them."""
    plain = plain_model(kind, folder / "plain", **sizes)
    config = AutoConfig.from_pretrained(folder / "plain")
    (folder / "gguf").mkdir()
    path = folder / "gguf" / "model.gguf"
    read = write_gguf(path, kind, config, plain, typed)
    for name in plain:
        plain[name] = _found(kind, config, name, plain, read)
    return path, config, plain


def _found(kind: str, config: Any, name: str, plain: dict, read: dict) -> torch.Tensor:
    """What the file holds of a tensor: where it lies in the file is found by marking the tensor alone."""
    if all(np.array_equal(read[one], values) for one, values in _only(kind, config, plain).items()):
        return plain[name]
    shape = plain[name].shape
    marks = {one: torch.zeros_like(tensor) for one, tensor in plain.items()}
    marks[name] = torch.arange(1, shape.numel() + 1, dtype=torch.float64).reshape(shape).float()
    out = torch.empty(shape.numel())
    for one, values in gguf_tensors(kind, config, marks).items():
        flat = values.reshape(-1)
        at = flat.nonzero()[0]
        if len(at):
            out[flat[at].astype(np.int64) - 1] = torch.from_numpy(read[one].reshape(-1)[at])
    return out.reshape(shape)


def _only(kind: str, config: Any, plain: dict) -> dict[str, np.ndarray]:
    return gguf_tensors(kind, config, plain)


def fit(path: Path, out: Path, rate: float, precision: str = "auto") -> None:
    text = out.parent / "text.txt"
    text.write_text(TEXT)
    api.fit(
        str(path), out, budget="4GB", device="cpu", rate=rate, precision=precision,
        calibration=text, calibration_tokens=512,
    )  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def reference(folder: Path, config: Any, plain: dict) -> Any:
    """transformers with the tensors of the file, in fp32."""
    folder.mkdir()
    config.save_pretrained(folder)
    whole = {name: one.contiguous() for name, one in plain.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def assert_reads(path: Path, plain: dict, dtype: torch.dtype) -> None:
    """Every tensor, whole and in pieces; what is quantised is rounded once to ``dtype``."""
    with open_model(locate(str(path))).tensors() as tensors:
        assert set(tensors) == set(plain)
        for name, wanted in plain.items():
            lazy = tensors[name]
            wanted = wanted if lazy.dtype == torch.float32 else wanted.to(dtype)
            assert lazy.shape == wanted.shape and lazy.get_shape() == list(wanted.shape)
            assert torch.equal(lazy[...], wanted), name
            assert torch.equal(lazy[-1], wanted[-1]), name
            assert torch.equal(lazy[1:], wanted[1:]), name
            rest = (slice(None), slice(1, None)) if wanted.dim() > 1 else slice(0, 1)
            assert torch.equal(lazy[rest], wanted[rest]), name


UNNAMED = {"_name_or_path", "eos_token_id", "pad_token_id", "dtype", "transformers_version"}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_model_comes_out_as_it_went_in(kind: str, tmp_path: Path) -> None:
    path, config, plain = source(kind, tmp_path)
    assert_reads(path, plain, torch.float32)
    opened = open_model(locate(str(path)))
    assert opened.anatomy.source_form == "f32"
    # What the test's family names and this kind of model does not know is in no file.
    known = set(type(config)().to_dict()) - UNNAMED
    ours, theirs = opened.config.to_dict(), config.to_dict()
    if theirs.get("head_dim") is None:
        theirs["head_dim"] = ours.get("head_dim")
        assert theirs["head_dim"] in (None, config.hidden_size // config.num_attention_heads)
    assert {one: ours.get(one) for one in known} == {one: theirs.get(one) for one in known}
    assert ours["eos_token_id"] == [266, 268]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_fit_of_it_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    path, config, plain = source(kind, tmp_path, all_of("Q8_0"))
    plain = {n: one if one.dim() < 2 or _stays(n) else one.bfloat16().float() for n, one in plain.items()}  # fmt: skip
    wanted = logits(reference(tmp_path / "reference", config, plain))
    report = api.plan(str(path), budget="4GB", device="cpu")
    assert report.tokenizer and not report.plan.unchanged
    fit(path, tmp_path / "whole", 0.0, "bf16")
    found = logits(load_package(tmp_path / "whole", device="cpu", dtype=torch.float32))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    written = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert written["architectures"] == config.architectures


def _stays(name: str) -> bool:
    """Whether a matrix is in F32 in every file."""
    return ".gate.weight" in name or "router" in name or "shared_expert_gate" in name


def test_half_of_the_experts_go_and_it_answers_and_is_measured(tmp_path: Path) -> None:
    path, _, _ = source("qwen3_moe", tmp_path, all_of("Q4_0"))
    out = tmp_path / "half"
    fit(path, out, 0.5)
    manifest = open_package(out).manifest
    assert manifest.rate == 0.5 and manifest.receipt["kl"] >= 0
    assert logits(load_package(out, device="cpu")).isfinite().all()
    for against in (None, str(path)):
        report = api.evaluate(
            out, against=against, text=tmp_path / "text.txt", tokens=128, sequence_length=64,
            continuations=0, device="cpu",
        )  # fmt: skip
        assert report.reference is not None and report.reference.origin
        assert report.quality.kl == pytest.approx(report.quality.kl, abs=1.0)
    alone = api.evaluate(
        str(path), text=tmp_path / "text.txt", tokens=128, sequence_length=64, continuations=0, device="cpu",
    )  # fmt: skip
    assert alone.model.experts_bytes == open_model(locate(str(path))).anatomy.experts_bytes
    answer = api.load(out, device="cpu")
    assert answer is not None


WIDE = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_local_experts": 3,
    "num_hidden_layers": 1,
}
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the fp16 scales of a block are."""
IQ = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ4_NL", "IQ4_XS")
SMALL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "F16", "BF16")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict]:
    folder = tmp_path_factory.mktemp("wide")
    plain = plain_model("qwen3_moe", folder, **WIDE)
    return AutoConfig.from_pretrained(folder), plain


def random_blocks(name: str, seed: int) -> np.ndarray:
    """Three matrices [256, 256] of random blocks, with scales of a sane size."""
    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    drawn = np.random.default_rng(seed)
    if name in ("F16", "BF16"):
        return gguf.quantize(drawn.normal(0, 0.1, (3, 256, 256)).astype(np.float32), kind)
    data = drawn.integers(0, 256, (3, 256, 256 // block, block_bytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for at in SCALES.get(name, (0, 2) if name in ("Q4_1", "Q5_1") else (0,)):
        data[..., at : at + 2] = scale
    if name == "MXFP4":
        data[..., 0] = 122
    return data.reshape(3, 256, -1)


@pytest.mark.parametrize("name", [*SCALES, *IQ, *SMALL])
def test_every_type_is_expanded_as_the_library_expands_it(name: str, wide, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    stacks = {part: random_blocks(name, seed) for seed, part in enumerate(("gate", "up", "down"))}
    path = tmp_path / "model.gguf"
    packed = {f"blk.0.ffn_{part}_exps.weight": (data, kind) for part, data in stacks.items()}
    write_gguf(path, "qwen3_moe", *wide, packed=packed)
    model = open_gguf(path)
    dtype = torch.float16 if name == "F16" else torch.bfloat16
    with ShardReader(model.index) as reader:
        tensors = GgufTensors(reader, model.tensors)
        for part, data in stacks.items():
            floats = gguf.dequantize(data, kind).reshape(3, 256, 256)
            whole = torch.from_numpy(floats.astype(np.float32))
            assert whole.isfinite().all() and float(whole.abs().max()) > 0
            for number in range(3):
                full = f"model.layers.0.mlp.experts.{number}.{part}_proj.weight"
                assert model.tensors[full].form == name.lower()
                assert model.tensors[full].nbytes == data.nbytes // 3
                assert tensors[full].dtype == dtype
                assert torch.equal(tensors[full][...], whole[number].to(dtype))
                assert torch.equal(tensors[full][7:19], whole[number][7:19].to(dtype))


def test_the_tied_head_and_the_folder(tmp_path: Path) -> None:
    path, _, plain = source("qwen3_moe", tmp_path, tie_word_embeddings=True)
    opened = open_model(locate(str(path.parent)))
    assert opened.config.tie_word_embeddings
    assert "lm_head.weight" not in plain
    assert opened.identity == open_model(locate(str(path))).identity


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.attn_factor", 1.2),
        ("rope.dimension_count", 8),
        ("attention.value_length", 32),
        ("expert_gating_func", 2),
        ("expert_group_count", 4),
        ("final_logit_softcapping", 30.0),
        ("vocab_size", 7),
    ],
)
def test_a_field_that_is_not_computed_is_refused_by_name(
    field: str, value: Any, tmp_path: Path
) -> None:
    path, config, plain = source("qwen3_moe", tmp_path)
    fields = {**fields_of("qwen3_moe", config), field: value}
    write_gguf(path, "qwen3_moe", config, plain, fields=fields)
    with pytest.raises(UnsupportedModel, match=rf"qwen3moe\.{field}"):
        api.plan(str(path), budget="4GB", device="cpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_count", None),
        ("block_count", 0),
        ("block_count", 1 << 31),
        ("attention.head_count", 1.5),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.freq_base", -1.0),
        ("embedding_length", 48),
        ("expert_used_count", 0),
        ("expert_count", 4),
        ("attention.head_count", 3),
        ("block_count", 2),
        ("block_count", 5),
    ],
)
def test_a_field_that_cannot_be_is_one_error(field: str, value: Any, tmp_path: Path) -> None:
    path, config, plain = source("qwen3_moe", tmp_path)
    fields = {**fields_of("qwen3_moe", config), field: value}
    fields = {key: one for key, one in fields.items() if one is not None}
    write_gguf(path, "qwen3_moe", config, plain, fields=fields)
    with pytest.raises(ConmoeError) as caught:
        api.plan(str(path), budget="4GB", device="cpu")
    assert caught.value.why


def test_tensors_that_do_not_belong_are_named(tmp_path: Path) -> None:
    path, config, plain = source("mixtral", tmp_path)
    tensors = gguf_tensors("mixtral", config, plain)
    for name, says in (("rope_freqs.weight", "frequencies"), ("blk.0.strange.weight", "nothing")):
        more = {**tensors, name: np.ones((2, 32), np.float32)}
        write_gguf(path, "mixtral", config, plain, tensors=more)
        with pytest.raises(UnsupportedModel, match=name) as caught:
            api.plan(str(path), budget="4GB", device="cpu")
        assert says in caught.value.why
    lost = {key: one for key, one in tensors.items() if key != "blk.1.ffn_up_exps.weight"}
    write_gguf(path, "mixtral", config, plain, tensors=lost)
    with pytest.raises(CheckpointError, match=r"layers\.1\.block_sparse_moe\.experts\.\d\.w3"):
        api.plan(str(path), budget="4GB", device="cpu")
    lost = {key: one for key, one in tensors.items() if key != "blk.1.attn_k.weight"}
    write_gguf(path, "mixtral", config, plain, tensors=lost)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj"):
        api.plan(str(path), budget="4GB", device="cpu")


def test_numbers_that_are_none_stop_the_fit(tmp_path: Path) -> None:
    path, config, plain = source("olmoe", tmp_path)
    tensors = gguf_tensors("olmoe", config, plain)
    tensors["blk.1.ffn_up_exps.weight"][3, 4, 5] = np.inf
    write_gguf(path, "olmoe", config, plain, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up_exps\.weight"):
        fit(path, tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["olmoe", "qwen2_moe", "mixtral", "deepseek_v2"])
def test_gate_and_up_in_one_tensor(kind: str, tmp_path: Path) -> None:
    """As llama.cpp's script writes them with --fuse-gate-up-exps: the rows of the gate above the others."""
    path, config, plain = source(kind, tmp_path)
    tensors = gguf_tensors(kind, config, plain)
    for name in [one for one in tensors if one.endswith("ffn_gate_exps.weight")]:
        up = name.replace("gate", "up")
        both = np.concatenate([tensors.pop(name), tensors[up]], 1)
        tensors[name.replace("gate", "gate_up")] = both
    unfused = {one for one in tensors if one.endswith("ffn_up_exps.weight")}
    write_gguf(path, kind, config, plain, tensors=tensors)
    with pytest.raises(CheckpointError, match="twice"):
        open_gguf(path)
    write_gguf(
        path, kind, config, plain, all_of("Q8_0"),
        tensors={one: values for one, values in tensors.items() if one not in unfused},
    )  # fmt: skip
    found = open_gguf(path)
    with ShardReader(found.index) as reader:
        read = GgufTensors(reader, found.tensors)
        assert set(read) == set(plain)
        for name in [one for one in plain if ".experts." in one]:
            lines = plain[name].float().numpy()
            kept = gguf.quantize(np.ascontiguousarray(lines), gguf.GGMLQuantizationType.Q8_0)
            wanted = torch.from_numpy(gguf.dequantize(kept, gguf.GGMLQuantizationType.Q8_0))
            assert torch.equal(read[name][...], wanted.to(read[name].dtype)), name


def test_layers_without_experts_in_qwen_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    path, config, plain = source("qwen3_moe", tmp_path, mlp_only_layers=[0])
    tensors = gguf_tensors("qwen3_moe", config, plain)
    assert "blk.0.ffn_gate.weight" in tensors
    write_gguf(path, "qwen3_moe", config, plain, tensors=tensors)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_down\.weight") as caught:
        open_gguf(path)
    assert "llama.cpp has experts in every layer of qwen3moe" in caught.value.why


def test_dense_models_and_other_architectures_are_named(tmp_path: Path) -> None:
    for architecture, says in (("llama", "dense"), ("gemma4", "gemma4")):
        path = tmp_path / f"{architecture}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UnsupportedModel, match=says):
            api.plan(str(path), budget="4GB", device="cpu")
    with pytest.raises(ConmoeError, match=r"There is no file models/none\.gguf"):
        api.plan("models/none.gguf", budget="4GB", device="cpu")


def test_experts_in_mxfp4_stay_so(tmp_path: Path) -> None:
    """gpt-oss as it is published for llama.cpp: a record holds the numbers of the file."""
    path, config, plain = source("gpt_oss", tmp_path, all_of("MXFP4"))
    for name in list(plain):
        if ".experts." in name or (plain[name].dim() > 1 and "router" not in name):
            plain[name] = plain[name].bfloat16().float()
    wanted = logits(reference(tmp_path / "reference", config, plain))
    report = api.plan(str(path), budget="4GB", device="cpu", rate=0.0)
    assert report.plan.chosen.precision == "mxfp4"
    fit(path, tmp_path / "whole", 0.0)
    found = logits(load_package(tmp_path / "whole", device="cpu", dtype=torch.float32))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
