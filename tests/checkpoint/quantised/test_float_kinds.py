"""Tiny checkpoints that the kinds' own tools wrote (``tools/make_quantised_float_fixtures.py``): each tensor is the one
that the tool itself expands, and what is made of them runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from families import save_tokenizer
from safetensors.torch import load_file, save_file

from conmoe_edge import api
from conmoe_edge.checkpoint.quantised.forms import FORMS
from conmoe_edge.checkpoint.sources.locate import locate
from conmoe_edge.cli.main import main
from conmoe_edge.integrations.load import load_package
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


def fit(source: Path, out: Path, rate: float) -> None:
    text = source.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 30)
    api.fit(
        str(source), out, budget="4GB", device="cpu", rate=rate, method="conmoe",
        calibration=text, calibration_tokens=256,
    )  # fmt: skip


def by_transformers(kind: str, folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    save_file(plain_of(kind), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((DATA / kind / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", list(KINDS))
def test_fit_at_two_rates_and_chat(kind: str, tmp_path: Path) -> None:
    """At rate 0, in fp32, the package computes what transformers computes with the expanded weights."""
    source = source_of(kind, tmp_path / "source")
    fit(source, tmp_path / "whole", 0.0)
    found = logits(load_package(tmp_path / "whole", device="cpu", dtype=torch.float32))
    wanted = logits(by_transformers(kind, tmp_path / "plain"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    fit(source, tmp_path / "half", 0.5)
    half = logits(load_package(tmp_path / "half", device="cpu", dtype=torch.float32))
    assert half.isfinite().all() and not torch.allclose(half, wanted, atol=1e-3)
    arguments = ["chat", str(tmp_path / "half"), "--prompt", "hello", "--max-tokens", "4"]
    said = CliRunner().invoke(main, arguments)
    assert said.exit_code == 0, said.output


def test_every_form_of_floats_has_a_fixture() -> None:
    assert set(KINDS.values()) | {"mxfp4", "fp8"} <= set(FORMS)
    assert {path.name for path in DATA.iterdir()} >= set(KINDS)
