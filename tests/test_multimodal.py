"""Models that take pictures or sound too: a package answers text as transformers' class for the whole model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, materialise, save_tokenizer
from multimodal import MODELS, save_tiny_multimodal, tiny_multimodal
from safetensors.torch import load_file

from conmoe_edge import api
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.errors import UnsupportedModel, UsageError
from conmoe_edge.model.text_part import Absent

OFTEN = ("qwen3_vl_moe", "glm4v_moe", "qwen3_5_moe", "kimi_k25", "gemma4")
NAMES = [
    name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)
    for name in MODELS
    if name != "ernie4_5_vl_moe"
]
LENGTH = 100


def tokens() -> torch.Tensor:
    drawn = torch.Generator().manual_seed(5)
    return torch.randint(3, 90, (1, LENGTH), generator=drawn)


def fit(source: Path, out: Path, rate: float | str = 0.0, **more: Any) -> api.FitReport:
    text = source.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    settings: dict[str, Any] = {
        "budget": "4GB",
        "device": "cpu",
        "method": "conmoe",
        "calibration": text,
        "calibration_tokens": 1024,
    }
    return api.fit(str(source), out, rate=rate, **{**settings, **more})


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-VL-MoE as it is published: everything in one file."""
    folder = tmp_path_factory.mktemp("vl") / "source"
    save_tiny_multimodal("qwen3_vl_moe", folder)
    save_tokenizer(folder)
    return folder


def whole(folder: Path, **more: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, **more).eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def answer(model: Any, ids: torch.Tensor) -> list[int]:
    more = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more)[0].tolist()


def token_by_token(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A prompt of half the tokens, and one token after the other behind it."""
    from conmoe_edge.compat import cache_argument, cache_of

    half = ids.shape[1] // 2
    pieces = [ids[:, :half], *ids[:, half:].split(1, dim=1)]
    cache, found = None, []
    with torch.no_grad():
        for piece in pieces:
            given = {} if cache is None else cache_argument(model, cache)
            out = model(input_ids=piece, use_cache=True, **given)
            cache = cache_of(out)
            found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_text_is_what_the_whole_model_gives(name: str, tmp_path: Path) -> None:
    model = save_tiny_multimodal(name, tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    report = fit(tmp_path / "source", tmp_path / "out")
    package = api.load(tmp_path / "out", device="cpu")
    ids = tokens()
    wanted = logits(model, ids)
    torch.testing.assert_close(logits(package, ids), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(token_by_token(package, ids), wanted, rtol=0, atol=5e-5)
    assert answer(package, ids[:, :20]) == answer(model, ids[:, :20])
    left_out = sorted({*CheckpointIndex.open(tmp_path / "source").tensors} - _taken(name, tmp_path))
    assert left_out == list(report.plan.beside.tensors) != []
    assert any("left out" in note and f"{len(left_out)} tensors" in note for note in report.notes)


def _taken(name: str, folder: Path) -> set[str]:
    """Tensors of the source that a package has, the routed experts included."""
    dense = {*CheckpointIndex.open(folder / "out").tensors}
    source = {*CheckpointIndex.open(folder / "source").tensors}
    return (dense & source) | {one for one in source if ".experts." in one and "shared" not in one}


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "kimi_k25"])
def test_half_the_experts(name: str, tmp_path: Path) -> None:
    model = save_tiny_multimodal(name, tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    fit(tmp_path / "source", tmp_path / "out", 0.5)
    slots = load_manifest(tmp_path / "out").slots
    wanted = logits(materialise(model, slots), tokens())
    package = api.load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(package, tokens()), wanted, rtol=0, atol=2e-5)


def test_the_operator_in_bf16(tmp_path: Path) -> None:
    """With the operator's products, as a package from the hub runs: close to transformers' own numbers in bf16."""
    model = tiny_multimodal("qwen3_vl_moe", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    fit(tmp_path / "source", tmp_path / "out")
    package = api.load(tmp_path / "out", device="cpu")
    wanted = logits(model, tokens()).float()
    exact = logits(model.float(), tokens())
    found = token_by_token(package, tokens()).float()
    assert (found - exact).norm() < 1.5 * (wanted - exact).norm()


def test_eval_compares_with_the_source(qwen: Path, tmp_path: Path) -> None:
    fit(qwen, tmp_path / "out", 0.5)
    report = api.evaluate(str(tmp_path / "out"), against=str(qwen), tokens=256, device="cpu")
    assert report.to_json()


def test_the_plan_says_what_is_left_out(qwen: Path) -> None:
    report = api.plan(str(qwen), budget="4GB", device="cpu", rate=0.5)
    said = report.to_json()["other_parts"]
    visual = {n: t for n, t in load_file(qwen / "model.safetensors").items() if ".visual." in n}
    nbytes = sum(one.numel() * one.element_size() for one in visual.values())
    assert said == {
        "modules": ["model.visual"],
        "tensors": len(visual),
        "bytes": nbytes,
        "kept": False,
    }
    kept = api.plan(str(qwen), budget="4GB", device="cpu", rate=0.5, keep_vision=True)
    assert kept.to_json()["other_parts"]["kept"] is True
    assert kept.plan.disk_bytes - report.plan.disk_bytes == nbytes
    assert kept.plan.device_bytes_used - report.plan.device_bytes_used == nbytes


def test_vision_that_is_kept_opens_with_the_class_for_the_whole_model(
    qwen: Path, tmp_path: Path
) -> None:
    report = fit(qwen, tmp_path / "out", keep_vision=True)
    assert any("AutoModelForImageTextToText" in note for note in report.notes)
    source, written = CheckpointIndex.open(qwen), CheckpointIndex.open(tmp_path / "out")
    kept = [name for name in source.tensors if ".visual." in name]
    with ShardReader(source) as theirs, ShardReader(written) as ours:
        assert all(torch.equal(theirs[name][...], ours[name][...]) for name in kept)
    original = whole(qwen)
    package = whole(tmp_path / "out")
    assert type(package) is type(original)
    torch.testing.assert_close(logits(package, tokens()), logits(original, tokens()))
    given = picture(original)
    with torch.no_grad():
        wanted, found = original(**given).logits, package(**given).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert not torch.allclose(wanted, logits(original, given["input_ids"])), "the picture counts"
    text_alone = api.load(tmp_path / "out", device="cpu")
    assert isinstance(text_alone.model.visual, Absent)
    torch.testing.assert_close(logits(text_alone, tokens()), logits(original, tokens()))


def picture(model: Any) -> dict[str, Any]:
    """A picture of 2 x 2 merged patches between words."""
    config = model.config
    side = config.vision_config.patch_size
    numbers = 3 * config.vision_config.temporal_patch_size * side * side
    merged = 4
    ids = [5, 6, 92, *[90] * merged, 93, *range(10, 40)]
    return {
        "input_ids": torch.tensor([ids]),
        "mm_token_type_ids": torch.tensor([[int(one == 90) for one in ids]]),
        "pixel_values": torch.randn(16, numbers, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def test_a_package_of_text_refuses_a_picture(qwen: Path, tmp_path: Path) -> None:
    fit(qwen, tmp_path / "out")
    given = picture(tiny_multimodal("qwen3_vl_moe"))
    for package in (api.load(tmp_path / "out", device="cpu"), whole(tmp_path / "out")):
        torch.testing.assert_close(logits(package, tokens()), logits(whole(qwen), tokens()))
        with pytest.raises(UsageError, match="for text only") as error:
            package(**given)
        assert "--keep-vision" in error.value.fix


def test_a_model_that_fits_is_linked_with_everything(qwen: Path, tmp_path: Path) -> None:
    report = fit(qwen, tmp_path / "out", "auto")
    assert report.plan.plan.unchanged
    assert {*CheckpointIndex.open(tmp_path / "out").tensors} == {
        *CheckpointIndex.open(qwen).tensors
    }
    text_alone = api.load(tmp_path / "out", device="cpu")
    assert isinstance(text_alone.model.visual, Absent)
    torch.testing.assert_close(logits(text_alone, tokens()), logits(whole(qwen), tokens()))
    given = picture(text_alone)
    assert torch.equal(whole(tmp_path / "out")(**given).logits, whole(qwen)(**given).logits)


def test_nothing_to_keep(tmp_path: Path) -> None:
    from families import save_tiny

    save_tiny("olmoe", tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    with pytest.raises(UsageError, match="nothing that --keep-vision could keep"):
        api.plan(str(tmp_path / "source"), budget="4GB", device="cpu", keep_vision=True)


def test_dense_weights_in_int8_beside_kept_vision(qwen: Path, tmp_path: Path) -> None:
    fit(qwen, tmp_path / "out", keep_vision=True, dense_precision="int8")
    tensors = CheckpointIndex.open(tmp_path / "out").tensors
    assert tensors["model.language_model.layers.0.self_attn.q_proj.weight"].dtype == "I8"
    assert {one.dtype for name, one in tensors.items() if ".visual." in name} == {"F32"}
    for package in (api.load(tmp_path / "out", device="cpu"), whole(tmp_path / "out")):
        found, wanted = logits(package, tokens()), logits(whole(qwen), tokens())
        assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_layers_with_experts_for_pictures_are_refused(tmp_path: Path) -> None:
    save_tiny_multimodal("ernie4_5_vl_moe", tmp_path)
    with pytest.raises(UnsupportedModel, match="2 sets of routed experts") as error:
        api.plan(str(tmp_path), budget="4GB")
    assert "baidu/ERNIE-4.5-21B-A3B-PT" in error.value.fix


def test_the_config_stays_that_of_the_whole_model(qwen: Path, tmp_path: Path) -> None:
    fit(qwen, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    assert config["vision_config"]["depth"] == 2 and config["text_config"]["vocab_size"] == VOCAB


def test_an_export_has_the_vision_that_was_kept(qwen: Path, tmp_path: Path) -> None:
    fit(qwen, tmp_path / "kept", keep_vision=True)
    api.export(tmp_path / "kept", tmp_path / "plain")
    exported, original = whole(tmp_path / "plain"), whole(qwen)
    given = picture(original)
    with torch.no_grad():
        torch.testing.assert_close(exported(**given).logits, original(**given).logits)
    fit(qwen, tmp_path / "text")
    with pytest.raises(UnsupportedModel, match="text part of a qwen3_vl_moe") as error:
        api.export(tmp_path / "text", tmp_path / "no")
    assert "--keep-vision" in error.value.fix and not (tmp_path / "no").exists()
