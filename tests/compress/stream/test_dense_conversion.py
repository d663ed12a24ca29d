"""Dense weights on the disk: int8 where it was asked for, as many bytes as the plan says, and back again."""

from __future__ import annotations

from pathlib import Path

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
    model = load_package(fitted / "out", device="cpu", slots=(3,))
    ids = torch.arange(5, 25)[None]
    assert bool(torch.isfinite(model(ids).logits).all())


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
