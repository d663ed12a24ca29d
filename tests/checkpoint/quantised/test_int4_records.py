"""Experts of an int4 checkpoint become records with the same numbers: whole ones bit for bit, narrow ones by rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_kinds import KINDS, opened, source_of
from quantised_fits import fit
from safetensors.torch import load_file
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
    assert receipt["kl_mean"] == 0.0, receipt


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
