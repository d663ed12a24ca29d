"""Config and headers must describe the same model; what does not is refused by the tensor's own name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, save_tokenizer, tiny_model
from hand_packages import thirds, write_package
from safetensors.torch import load_file, save_file

from conmoe_edge import api
from conmoe_edge.errors import CheckpointError, ConmoeError, PackageError, UnsupportedModel

FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3", "mixtral", "qwen3_5_moe_text")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


@pytest.fixture
def olmoe(whole: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole["olmoe"], tmp_path / "model"))


def plan(folder: Path) -> Any:
    return api.plan(str(folder), budget="4GB", device="cpu")


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_missing_tensor_is_named(family: str, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole[family], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    for name in sorted(tensors)[:: max(1, len(tensors) // 8)]:
        kept = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            plan(folder)
        assert caught.value.what == f"The tensor {name} is missing."
        assert caught.value.why and caught.value.fix and "Error" not in str(caught.value)


MISSING = "model.layers.2.mlp.gate.weight"


def test_every_door_to_a_model_names_a_missing_tensor(olmoe: Path, tmp_path: Path) -> None:
    save_tokenizer(olmoe)
    rewrite(olmoe, **{MISSING: None})
    for use in (
        lambda: plan(olmoe),
        lambda: api.fit(str(olmoe), tmp_path / "out", budget="4GB", device="cpu", rate=0.5),
        lambda: api.evaluate(str(olmoe), tokens=64),
    ):
        with pytest.raises(CheckpointError, match=f"The tensor {MISSING} is missing"):
            use()


def test_every_door_to_a_package_names_a_missing_tensor(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    package = write_package(model, tmp_path / "package", thirds(model))
    save_tokenizer(package)
    shard = next(package.glob("dense-*.safetensors"))
    tensors = load_file(shard)
    del tensors[MISSING]
    save_file(tensors, shard, metadata={"format": "pt"})
    for index in package.glob("*.index.json"):
        value = json.loads(index.read_text())
        value["weight_map"].pop(MISSING)
        index.write_text(json.dumps(value))
    manifest = json.loads((package / "conmoe.json").read_text())
    for path in (shard, *package.glob("*.index.json")):
        data = path.read_bytes()
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"][path.name].update(entry)
    (package / "conmoe.json").write_text(json.dumps(manifest))
    for use in (
        lambda: api.load(package, device="cpu"),
        lambda: api.export(package, tmp_path / "plain"),
    ):
        with pytest.raises(ConmoeError) as caught:
            use()
        assert MISSING in str(caught.value) and "Traceback" not in str(caught.value)
        assert caught.value.fix


def test_a_tensor_of_another_shape_is_named(olmoe: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    rewrite(olmoe, **{name: torch.zeros(7, 32)})
    with pytest.raises(CheckpointError, match=rf"{name} has the shape \[7, 32\]"):
        plan(olmoe)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 2},
        {"num_experts": 7},
        {"num_experts": 9},
        {"hidden_size": 16},
        {"intermediate_size": 24},
        {"vocab_size": 95},
        {"num_key_value_heads": 4},
        {"num_hidden_layers": 4},
    ],
)
def test_sizes_that_are_not_those_of_the_tensors_are_refused(
    olmoe: Path, fields: dict[str, int]
) -> None:
    change(olmoe, **fields)
    with pytest.raises(ConmoeError, match=r"tensor|shape"):
        plan(olmoe)


def test_a_tensor_that_the_config_leaves_out_is_refused(tmp_path: Path) -> None:
    """Without its biases the model would answer, and differently."""
    folder = save_tiny("glm4_moe", tmp_path / "model", attention_bias=True)
    plan(folder)
    change(folder, attention_bias=False)
    with pytest.raises(CheckpointError, match="bias has no place"):
        plan(folder)


def test_experts_that_are_numbered_with_a_gap_are_refused(olmoe: Path) -> None:
    """The loader would put the expert behind the gap in its place."""
    tensors = load_file(olmoe / "model.safetensors")
    moved = {n: t for n, t in tensors.items() if n.startswith("model.layers.1.mlp.experts.7.")}
    rewrite(
        olmoe,
        **dict.fromkeys(moved),
        **{name.replace("experts.7.", "experts.9."): tensor for name, tensor in moved.items()},
    )
    with pytest.raises(CheckpointError, match=r"experts\.7\..* is missing"):
        plan(olmoe)


def test_stale_buffers_and_other_heads_have_no_place_and_do_no_harm(olmoe: Path) -> None:
    rewrite(
        olmoe,
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
            "mtp.head.weight": torch.zeros(4, 4),
        },
    )
    plan(olmoe)


OUTSIDE = ("model.embed_scale.weight", "lm_head.bias", "model.norm.bias", "score.weight")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_tensor_outside_the_layers_without_a_place_is_refused(olmoe: Path, name: str) -> None:
    rewrite(olmoe, **{name: torch.zeros(4)})
    with pytest.raises(CheckpointError, match=f"{name} has no place"):
        plan(olmoe)


def test_parts_for_pictures_and_sound_do_no_harm(olmoe: Path) -> None:
    names = (
        *("visual.blocks.0.attn.qkv.weight", "model.vision_tower.patch.weight"),
        *("multi_modal_projector.linear_1.weight", "model.embed_audio.weight", "audio_tower.x"),
        *("model.mtp_block.0.norm.weight", "model.mtp.layers.0.fc.weight"),
        *("model.rotary_emb.inv_freq", "model.embeddings.position_ids"),
    )
    rewrite(olmoe, **{name: torch.zeros(4) for name in names})
    plan(olmoe)


def test_the_loader_casts_no_number_of_a_quantised_weight(olmoe: Path) -> None:
    from conmoe_edge.model.bridge import build_meta, load_subset, read_config

    model = build_meta(read_config(olmoe), torch.float32)
    name = "model.norm.weight"
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.int32):
        with pytest.raises(CheckpointError, match=name):
            load_subset(model, {name: torch.ones(32).to(dtype)}, torch.device("cpu"))


def test_a_tied_head_with_numbers_of_its_own_is_refused(olmoe: Path, tmp_path: Path) -> None:
    save_tokenizer(olmoe)
    change(olmoe, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="different numbers"):
        api.fit(
            str(olmoe),
            tmp_path / "out",
            budget="4GB",
            device="cpu",
            rate=0.5,
            calibration_tokens=512,
        )


def test_a_package_whose_config_leaves_layers_out_is_refused(tmp_path: Path) -> None:
    model = tiny_model("glm4_moe", attention_bias=True)
    package = write_package(model, tmp_path / "package", thirds(model))
    change(package, attention_bias=False)
    with pytest.raises(PackageError, match="has no place"):
        api.load(package, device="cpu")


@pytest.mark.parametrize("count", ["many", 8, [], None])
def test_a_dense_model_is_refused_whatever_it_says_of_experts(tmp_path: Path, count: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    config = LlamaConfig(vocab_size=96, num_hidden_layers=1, num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    change(tmp_path, num_experts=count)
    with pytest.raises(UnsupportedModel):
        plan(tmp_path)
