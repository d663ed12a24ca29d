"""Experts of an int4 checkpoint become records of the same numbers: whole ones bit for bit, narrow ones row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, save_tokenizer
from packed_kinds import DATA, KINDS, opened, source_of
from quantised_fits import fit
from safetensors.torch import load_file, save_file
from torch import Tensor

from conmoe_edge import api
from conmoe_edge.checkpoint.format.forms import Grid
from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.checkpoint.format.records import decode, matrix_of, view
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.checkpoint.package.record_headers import expert_of
from conmoe_edge.plan.levers import precisions, published_in

GRIDS = {
    "ct-w4-group": Grid(32, "bfloat16", False),
    "ct-w4-group-asym": Grid(16, "bfloat16", True),
    "gptq-w4": Grid(32, "float16", False),
    "gptq-w4-v1-asym": Grid(32, "float16", True),
    "awq-gemm": Grid(32, "float16", True),
    "awq-gemv": Grid(32, "float16", True),
    "auto-round-gptq": Grid(32, "float16", False),  # in a model in bf16
    "auto-round-awq": Grid(32, "float16", True),
}
"""Kinds of files whose experts stay as they are, and where their weights lie."""
OTHERS = sorted(set(KINDS) - set(GRIDS))
QUICK = ("gptq-w4-v1-asym", "auto-round-gptq")

Experts = dict[ExpertId, dict[str, Tensor]]


def expanded(source: Path) -> Experts:
    """Gate, up and down of every expert; ``test_packed_kinds.py`` holds them against their libraries' own."""
    found: Experts = {}
    model = opened(source)
    with model.tensors() as tensors:
        for layer in model.anatomy.moe_layers:
            assert layer.experts is not None
            for expert in range(layer.experts.count):
                at = f"model.layers.{layer.index}.mlp.experts.{expert}"
                gate, up, down = (
                    tensors[f"{at}.{one}_proj.weight"][...] for one in ("gate", "up", "down")
                )
                found[ExpertId(layer.index, expert)] = {
                    "gate_up_proj": torch.cat([gate, up]),
                    "down_proj": down,
                }
    return found


def experts_in(package: Path, dtype: torch.dtype) -> Experts:
    """What the records hold; every matrix is in the form of the source."""
    manifest = open_package(package).manifest
    assert {one.precision for one in manifest.layouts} == {"int4"}
    layouts = {entry.id: manifest.layouts[entry.layout] for entry in manifest.prototypes}
    found: Experts = {}
    for path in sorted(package.glob("prototypes-*.safetensors")):
        for name, record in load_file(path).items():
            parts = view(layouts[expert_of(name)], record)
            assert matrix_of(parts, "gate_up_proj").kind == "grid4"
            assert matrix_of(parts, "down_proj").kind == "grid4"
            found[expert_of(name)] = decode(parts, dtype, transposed=False)
    return found


@pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in GRIDS]
)
def test_an_expert_that_is_kept_whole_is_kept_bit_for_bit(kind: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path / "source")
    wanted = expanded(source)
    fit(source, tmp_path / "out", 0.0)
    dtype = wanted[ExpertId(1, 0)]["down_proj"].dtype
    found = experts_in(tmp_path / "out", dtype)
    assert found.keys() == wanted.keys()
    for expert, parts in found.items():
        for name, value in parts.items():
            assert value.dtype == dtype
            same = torch.equal(value.view(torch.int16), wanted[expert][name].view(torch.int16))
            assert same, (expert, name)
    receipt = open_package(tmp_path / "out").manifest.receipt
    assert receipt is not None
    # Where a processor has no bf16 products the two are computed in fp32, with scales finer than bf16 in one of them.
    assert receipt["kl"] < 1e-6 and receipt["top1_agreement"] == 1.0


@pytest.mark.parametrize("kind", list(GRIDS))
def test_a_plan_counts_what_the_source_has(kind: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path / "source")
    anatomy = opened(source).anatomy
    (grid,) = {part.grid for layer in anatomy.moe_layers for part in layer.experts.parts}  # pyright: ignore[reportOptionalMemberAccess]
    assert grid == GRIDS[kind]
    assert published_in(anatomy) == "int4"
    assert precisions(anatomy, "auto") == precisions(anatomy, "source") == ("int4",)
    assert precisions(anatomy, "int8") == ("int8",)
    plan = api.plan(str(source), budget="4GB", device="cpu").plan
    assert (plan.chosen.precision, plan.chosen.rate) == ("int4", 0.0)
    assert plan.chosen.reason == "fits in int4 as published, nothing is removed"


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_expanded(kind: str, tmp_path: Path) -> None:
    """Other bits, columns in the order of their activations, and sizes that say nothing of groups."""
    anatomy = opened(source_of(kind, tmp_path / "source")).anatomy
    assert published_in(anatomy) is None
    assert precisions(anatomy, "auto")[0] == "source"


WIDTH, GROUP = 128, 32


def wide_source(folder: Path) -> Path:
    """Experts of four groups of neurons each, packed as compressed-tensors packs them."""
    save_tiny(
        "qwen3_moe", folder, dtype=torch.bfloat16, moe_intermediate_size=WIDTH, hidden_size=64,
        num_hidden_layers=2,
    )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".mlp.experts." not in name:
            tensors[name] = weight
            continue
        base, groups = name.removesuffix("weight"), weight.float().unflatten(1, (-1, GROUP))
        scales = (groups.abs().amax(2) / 7).to(torch.bfloat16)
        numbers = (groups / scales.float().unsqueeze(2)).round().clamp(-8, 7).flatten(1) + 8
        places = torch.arange(0, 32, 4)
        words = (numbers.long().unflatten(1, (-1, 8)) << places).sum(2)
        tensors[f"{base}weight_packed"] = words.to(torch.uint32).view(torch.int32)
        tensors[f"{base}weight_scale"] = scales
        tensors[f"{base}weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    kept = json.loads((DATA / "ct-w4-group" / "config.json").read_text())
    config["quantization_config"] = kept["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    return folder


def test_of_an_expert_that_loses_neurons_gate_and_up_are_not_requantised(tmp_path: Path) -> None:
    """Rows of gate and up are the source's; down projections are refitted and rounded to such a grid again."""
    source = wide_source(tmp_path / "source")
    wanted = expanded(source)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 30)
    api.fit(
        str(source), tmp_path / "out", budget="4GB", device="cpu", rate=0.5, method="auto",
        widths="equal", calibration=text, calibration_tokens=256,
    )  # fmt: skip
    found = experts_in(tmp_path / "out", torch.bfloat16)
    (width,) = {parts["down_proj"].shape[1] for parts in found.values()}
    assert width < WIDTH and width % GROUP == 0
    for expert, parts in found.items():
        rows = [row.view(torch.int16).tolist() for row in wanted[expert]["gate_up_proj"]]
        kept = [row.view(torch.int16).tolist() for row in parts["gate_up_proj"]]
        places = [rows.index(one) for one in kept]  # raises where one is another number
        assert places[:width] == sorted(places[:width]) and max(places[:width]) < WIDTH
        assert [place - WIDTH for place in places[width:]] == places[:width]
