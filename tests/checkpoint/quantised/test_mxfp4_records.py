"""Experts of an MXFP4 checkpoint become MXFP4 records: whole ones bit for bit, narrow ones row by row."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from families import save_tokenizer
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks.make_gpt_oss_shape import Shape, make
from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.checkpoint.format.records import decode, view
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.checkpoint.package.record_headers import expert_of
from conmoe_edge.checkpoint.sources.locate import locate
from conmoe_edge.model.opened import open_model

DATA = Path(__file__).resolve().parents[2] / "data" / "quantised"
SHAPE = Shape(
    layers=2,
    experts=8,
    top_k=2,
    hidden=64,
    width=256,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=4096,
    context=512,
)

Experts = dict[ExpertId, dict[str, Tensor]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mxfp4") / "source"
    make(folder, SHAPE, 0, 1 << 30)
    return folder


@pytest.fixture(scope="module")
def expanded(source: Path) -> Experts:
    """The experts of the source as transformers expands them."""
    found: Experts = {}
    with open_model(locate(str(source))).tensors() as tensors:
        for layer in range(SHAPE.layers):
            at = f"model.layers.{layer}.mlp.experts"
            names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
            whole = {name: tensors[f"{at}.{name}"][...] for name in names}
            for expert in range(SHAPE.experts):
                found[ExpertId(layer, expert)] = {n: one[expert] for n, one in whole.items()}
    return found


def fitted(
    source: Path, out: Path, rate: float, method: str, widths: Literal["free", "equal"] = "free"
) -> Experts:
    """The experts of a package as its records hold them."""
    api.fit(
        str(source),
        out,
        budget="4GB",
        device="cpu",
        rate=rate,
        method=method,
        widths=widths,
        calibration_tokens=512,
    )
    return experts_in(out, transposed=True)


def experts_in(out: Path, *, transposed: bool) -> Experts:
    """As a module keeps them; the records are MXFP4."""
    manifest = open_package(out).manifest
    assert {one.precision for one in manifest.layouts} == {"mxfp4"}
    layouts = {entry.id: manifest.layouts[entry.layout] for entry in manifest.prototypes}
    found: Experts = {}
    for path in sorted(out.glob("prototypes-*.safetensors")):
        for name, record in load_file(path).items():
            parts = view(layouts[expert_of(name)], record)
            found[expert_of(name)] = decode(parts, torch.bfloat16, transposed)
    assert set(found) == set(layouts)
    return found


@pytest.mark.parametrize(("rate", "method"), [(0.0, "auto"), (0.5, "conmoe"), (0.5, "mone")])
def test_an_expert_that_is_kept_whole_is_kept_bit_for_bit(
    rate: float, method: str, source: Path, expanded: Experts, tmp_path: Path
) -> None:
    found = fitted(source, tmp_path / "out", rate, method)
    assert len(found) == len(expanded) * (1 - rate)
    for expert, parts in found.items():
        assert parts.keys() == expanded[expert].keys()
        for name, value in parts.items():
            assert torch.equal(value, expanded[expert][name]), (expert, name)


def test_a_package_that_changes_nothing_has_the_bytes_of_the_checkpoint(
    source: Path, tmp_path: Path
) -> None:
    fitted(source, tmp_path / "out", 0.0, "auto")
    held = sum(one.stat().st_size for one in (tmp_path / "out").glob("*.safetensors"))
    wanted = sum(one.nbytes for one in SHAPE.tensors())
    pages = (SHAPE.layers * SHAPE.experts + 16) * 4096  # headers are whole pages
    assert wanted <= held < wanted + pages


def test_of_an_expert_that_loses_neurons_gate_and_up_are_not_requantised(
    source: Path, expanded: Experts, tmp_path: Path
) -> None:
    """Rows of gate and up are the source's; down projections are refitted and rounded to MXFP4 again."""
    found = fitted(source, tmp_path / "out", 0.5, "auto", "equal")
    (width,) = {parts["down_proj"].shape[0] for parts in found.values()}
    assert width < SHAPE.width and width % 32 == 0
    for expert, parts in found.items():
        whole = expanded[expert]["gate_up_proj"]  # [H, 2 I], gate and up in turns
        columns = [column.numpy().tobytes() for column in whole.T.contiguous().view(torch.int16)]
        kept = [
            column.numpy().tobytes()
            for column in parts["gate_up_proj"].T.contiguous().view(torch.int16)
        ]
        places = [columns.index(one) for one in kept]  # raises where one is another number
        assert places == sorted(places)
        neurons = [place // 2 for place in places]
        assert neurons[::2] == neurons[1::2]


def test_compressed_tensors_mxfp4_stays_mxfp4(tmp_path: Path) -> None:
    """A linear layer for each projection of each expert, [out, in]: blocks run along a row there, too."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DATA / "mxfp4-compressed-tensors" / name, folder / name)
    save_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 30)
    out = tmp_path / "out"
    api.fit(
        str(folder), out, budget="4GB", device="cpu", rate=0.0, calibration=text,
        calibration_tokens=256,
    )  # fmt: skip
    wanted = load_file(DATA / "mxfp4-compressed-tensors" / "expanded.safetensors")
    found = experts_in(out, transposed=False)
    assert len(found) == api.plan(str(folder), budget="4GB", device="cpu").anatomy.expert_count
    for expert, parts in found.items():
        at = f"model.layers.{expert.layer}.mlp.experts.{expert.expert}"
        both = [wanted[f"{at}.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(parts["gate_up_proj"], torch.cat(both))
        assert torch.equal(parts["down_proj"], wanted[f"{at}.down_proj.weight"])
