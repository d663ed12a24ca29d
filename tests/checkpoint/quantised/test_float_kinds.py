"""Tiny checkpoints that the kinds' own tools wrote (``tools/make_quantised_float_fixtures.py``): each tensor is the one
that the tool itself expands, and what is made of them runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import save_tokenizer
from quantised_fits import check_fits
from safetensors.torch import load_file

from conmoe_edge.checkpoint.quantised.forms import FORMS
from conmoe_edge.checkpoint.sources.locate import locate
from conmoe_edge.model.opened import OpenedModel, open_model

DATA = Path(__file__).resolve().parents[2] / "data" / "quantised"
KINDS = {
    "nvfp4-modelopt": "nvfp4",
    "nvfp4-modelopt-stacked": "nvfp4",
    "nvfp4-compressed-tensors": "nvfp4",
    "mxfp4-compressed-tensors": "mxfp4",
    "mxfp8-compressed-tensors": "fp8",
    "fp8-compressed-tensors": "fp8",
    "fp8-modelopt": "fp8",
    "bitsandbytes-nf4-nested": "bitsandbytes-4bit",
    "bitsandbytes-fp4": "bitsandbytes-4bit",
    "bitsandbytes-int8": "bitsandbytes-int8",
}


def source_of(kind: str, folder: Path) -> Path:
    """The checkpoint without what it expands to, and with a tokenizer."""
    for name in ("config.json", "model.safetensors", "hf_quant_config.json"):
        if (DATA / kind / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(DATA / kind / name, folder / name)
    save_tokenizer(folder)
    return folder


def opened(folder: Path) -> OpenedModel:
    return open_model(locate(str(folder)))


def plain_of(kind: str) -> dict[str, torch.Tensor]:
    """The plain checkpoint: what the tool expands, and what it left in bf16."""
    stored = load_file(DATA / kind / "model.safetensors")
    kept = {name: one for name, one in stored.items() if one.dtype == torch.bfloat16}
    return {**kept, **load_file(DATA / kind / "expanded.safetensors")}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_tensor_is_the_one_that_the_tool_expands(kind: str, tmp_path: Path) -> None:
    model = opened(source_of(kind, tmp_path / "source"))
    wanted = plain_of(kind)
    assert model.scheme.form == KINDS[kind]
    with model.tensors() as tensors:
        assert set(tensors) == set(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(tensors[name][...], tensor), name
            if tensor.dim() == 3:
                assert torch.equal(tensors[name][1:3], tensor[1:3])
                assert torch.equal(tensors[name][-1], tensor[-1])


def test_undeclared_it_is_read_all_the_same(tmp_path: Path) -> None:
    """The tensors say it; a file that says nothing changes no number."""
    for kind in KINDS:
        source = source_of(kind, tmp_path / kind)
        (source / "hf_quant_config.json").unlink(missing_ok=True)
        config = json.loads((source / "config.json").read_text())
        del config["quantization_config"]
        (source / "config.json").write_text(json.dumps(config))
        wanted = load_file(DATA / kind / "expanded.safetensors")
        with opened(source).tensors() as tensors:
            for name in list(wanted)[::9]:
                assert torch.equal(tensors[name][...], wanted[name]), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_fit_at_two_rates_and_chat(kind: str, tmp_path: Path) -> None:
    """At rate 0, in fp32, the package computes what transformers computes with the expanded weights."""
    check_fits(source_of(kind, tmp_path / "source"), plain_of(kind), tmp_path)


def test_every_form_of_floats_has_a_fixture() -> None:
    assert set(KINDS.values()) | {"mxfp4", "fp8"} <= set(FORMS)
    assert {path.name for path in DATA.iterdir()} >= set(KINDS)
