"""Dense weights on the disk: int8 where it was asked for, as many bytes as the plan says, and back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.checkpoint.package.dense_names import DENSE_SCALE, quantised_forms
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_dense, write_tensors
from conmoe_edge.compress.stream.dense_conversion import Dequantised, dense_sources
from conmoe_edge.errors import CheckpointError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.bridge import build_meta, read_config, targets_of
from conmoe_edge.model.linears import dense_forms, quantisable_weights
from conmoe_edge.model.probe import facts_of, probe
from conmoe_edge.plan.dense_precision import stored

NAMES = [family.model_type for family in FAMILIES]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in NAMES), ("deepseek_v3", torch.float32)],
)
def test_planned_bytes_are_written_bytes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = CheckpointIndex.open(save_tiny(name, tmp_path / "model", dtype=dtype))
    config = read_config(str(tmp_path / "model"))
    anatomy = probe(config, facts_of(source.tensors))
    model = build_meta(config, dtype)
    targets = targets_of(model, source.tensors)
    experts = {n for n, target in targets.items() if ".experts." in target}
    names = dense_forms(quantisable_weights(model, targets), "int8")
    (tmp_path / "out").mkdir()
    with ShardReader(source) as reader:
        keys = [key for key in targets if key not in experts]
        written = write_dense(tmp_path / "out", dense_sources(reader, keys, names))
        package = CheckpointIndex.open(_with_config(tmp_path))
        assert quantised_forms(package.tensors) == names
        planned = stored(anatomy, "int8").dense_bytes
        assert sum(entry.nbytes for entry in package.tensors.values()) == planned
        assert planned < anatomy.dense_bytes and len(written) == 2
        with ShardReader(package) as back:
            again = Dequantised(back)
            assert sorted(again) == sorted(keys) and len(again) == len(keys)
            for key in keys:
                right = reader[key][...]
                if key in names:
                    right = quantise(right, "int8").dequantise()
                assert torch.equal(again[key][...], right)
                assert again[key].get_shape() == list(right.shape)


def _with_config(folder: Path) -> Path:
    (folder / "out" / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    return folder / "out"


def test_a_broken_weight_is_named(tmp_path: Path) -> None:
    weight = torch.ones(16, 16)
    weight[3, 3] = torch.nan
    write_tensors(
        tmp_path / "model.safetensors", [TensorSource("w", "float32", (16, 16), lambda: weight)]
    )
    (tmp_path / "config.json").write_text("{}")
    with ShardReader(CheckpointIndex.open(tmp_path)) as reader:
        sources = dense_sources(reader, ["w"], {"w": "int8"})
        with pytest.raises(CheckpointError, match="w holds NaN"):
            sources[0].load()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save_tiny("qwen2_moe", folder / "model", dtype=torch.bfloat16)
    save_tokenizer(folder / "model")
    text = folder / "text.txt"
    text.write_text("abcdefg hijklmn opqr " * 300)
    api.fit(
        str(folder / "model"),
        folder / "out",
        budget="2GB",
        device="cpu",
        rate=0.25,
        dense_precision="int8",
        calibration=text,
        calibration_tokens=512,
    )
    return folder


def test_a_fit_in_int8(fitted: Path) -> None:
    manifest = load_manifest(fitted / "out")
    package = CheckpointIndex.open(fitted / "out")
    planned = {term["name"]: term for term in manifest.plan["terms"]}["Dense weights"]
    assert manifest.dense_precision == "int8" == manifest.plan["dense_precision"]
    assert sum(entry.nbytes for entry in package.tensors.values()) == planned["nbytes"]
    assert "model.layers.0.self_attn.q_proj.weight" + DENSE_SCALE in package.tensors
    model = load_package(fitted / "out", device="cpu")
    ids = torch.arange(5, 25)[None]
    assert bool(torch.isfinite(model(ids).logits).all())


WIDE = {
    **{"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 32},
    **{"intermediate_size": 64, "shared_expert_intermediate_size": 64, "head_dim": 32},
}


@pytest.mark.parametrize("tied", [False, True])
def test_a_fit_in_four_bits(tied: bool, tmp_path: Path) -> None:
    """Bytes planned are bytes written, twice the same, and what runs is what was rounded."""
    model = tmp_path / "model"
    save_tiny("qwen2_moe", model, dtype=torch.bfloat16, tie_word_embeddings=tied, **WIDE)
    save_tokenizer(model)
    text = tmp_path / "text.txt"
    text.write_text("abcdefg hijklmn opqr " * 60)

    def fit(out: Path, **levers: Any) -> dict[str, Any]:
        settings = {"rate": 0.0, "calibration": text, "calibration_tokens": 256, **levers}
        api.fit(str(model), out, budget="2GB", device="cpu", dense_precision="q4", **settings)
        return {
            name: facts["sha256"]
            for name, facts in load_manifest(out).files.items()
            if name.endswith(".safetensors")
        }

    found = fit(tmp_path / "out")
    assert found == fit(tmp_path / "again")
    assert "dense-layer-00001.safetensors" in found
    assert ("dense-head.safetensors" in found) != tied
    manifest, package = (
        load_manifest(tmp_path / "out"),
        CheckpointIndex.open(tmp_path / "out"),
    )
    planned = {term["name"]: term for term in manifest.plan["terms"]}["Dense weights"]
    assert manifest.dense_precision == "q4"
    assert sum(entry.nbytes for entry in package.tensors.values()) == planned["nbytes"]
    forms = quantised_forms(package.tensors)
    shared = "model.layers.0.mlp.shared_expert.gate_proj.weight"
    assert (forms["model.embed_tokens.weight"], forms[shared]) == ("q6", "q4")
    assert 0 < manifest.receipt["kl"] < 1
    loaded: Any = load_package(tmp_path / "out", device="cpu")
    ids = torch.arange(5, 45)[None]
    with ShardReader(package) as reader, torch.no_grad():
        again = Dequantised(reader)
        wide = again["model.embed_tokens.weight"][...]
        torch.testing.assert_close(loaded.get_input_embeddings()(ids)[0], wide[ids[0]].bfloat16())
        x = torch.randn(40, 64).bfloat16()
        head = wide if tied else again["lm_head.weight"][...]
        right = x.float() @ head.T  # beside few bits the activations are rounded to 8
        assert (loaded.lm_head(x).float() - right).norm() < 0.015 * right.norm()
    assert bool(torch.isfinite(loaded(ids).logits).all())


def test_the_receipt_sees_the_head_that_runs(fitted: Path) -> None:
    """The original's logits come from its own head: with rate 0 the loss of int8 alone shows."""
    api.fit(
        str(fitted / "model"),
        fitted / "whole",
        budget="2GB",
        device="cpu",
        rate=0.0,
        dense_precision="int8",
        calibration=fitted / "text.txt",
        calibration_tokens=512,
    )
    receipt = load_manifest(fitted / "whole").receipt
    assert 0 < receipt["kl"] < load_manifest(fitted / "out").receipt["kl"]
