"""Every record of a package is really in its precision, whatever names and layouts the checkpoint has.

The packages are made by the public ``fit`` from tiny models: one stored expert by expert, one fused, one fused,
transposed and with biases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, save_tokenizer
from torch import Tensor

from conmoe_edge import api
from conmoe_edge.checkpoint.format.forms import SCALE
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.checkpoint.format.records import decode, encode, matrix_of, view
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.tensors.tensor_index import index_files
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.errors import DoesNotFit
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model import bridge
from conmoe_edge.model.anatomy import ExpertPart, ExpertsAnatomy
from conmoe_edge.model.experts import find_experts, part_names
from conmoe_edge.plan.levers import record_parts, spread
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest

# Wide enough that int8 and int4 records differ by whole pages.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "head_dim": 16,
    "mlp_only_layers": [],
}
FAMILIES = ("qwen3_moe", "granitemoe", "gpt_oss")
WIDE = 11


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "source"
    save_tiny(request.param, folder, **SIZES)
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog 0123456789 " * 40
    )
    return folder


def fit(source: Path, out: Path, **levers: Any) -> Manifest:
    settings: dict[str, Any] = {"budget": "4GB", "rate": 0.0, **levers}
    text = source.parent / "text.txt"
    api.fit(str(source), out, device="cpu", calibration=text, calibration_tokens=512, **settings)
    return load_manifest(out)


@pytest.fixture(scope="module")
def packages(source: Path) -> Callable[[str], tuple[Path, Manifest]]:
    """kind -> the package in that precision and its manifest; made once. The mix shares prototypes over two layers."""

    @functools.cache
    def make(kind: str) -> tuple[Path, Manifest]:
        out = source.parent / f"out-{kind}"
        levers: dict[str, Any] = {"scope": 2}
        if kind == "int8+int4":
            levers["budget"] = mixed_budget(source, WIDE)
        return out, fit(source, out, precision=kind, **levers)

    return make


def mixed_budget(source: Path, wide: int) -> str:
    """The least budget in which ``wide`` prototypes of the mix int8+int4 have 8 bits."""
    anatomy = api.plan(str(source), budget="4GB", device="cpu").anatomy
    low, high = 0, 4 * 10**9
    while low < high:
        middle = (low + high) // 2
        budget = Budget("cpu", middle, f"{middle}B", "test")
        try:
            plan = make_plan(anatomy, budget, PlanRequest(rate=0.0, scope=2, precision="int8+int4"))
            enough = plan.chosen.wide_prototypes >= wide
        except DoesNotFit:
            enough = False
        low, high = (low, middle) if enough else (middle + 1, high)
    return f"{low}B"


def experts_of(source: Path) -> dict[int, tuple[Any, dict[str, Tensor]]]:
    """Layer -> experts module and its fused parameters, as transformers loads them."""
    from transformers import AutoModelForCausalLM

    bridge.register_model()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return {
        layer: (module, {name: getattr(module, name).detach() for name in part_names(module)})
        for layer, (_, module) in find_experts(model).items()
    }


def records_of(package: Path, manifest: Manifest) -> dict[ExpertId, dict[str, Tensor]]:
    """The parts of every record, from the bytes on disk."""
    index = index_files(package, sorted({entry.file for entry in manifest.prototypes}))
    found = {}
    with ShardReader(index) as reader:
        for entry in manifest.prototypes:
            layout = manifest.layouts[entry.layout]
            record = reader[f"prototypes.{entry.id.layer}.{entry.id.expert}"][...]
            assert record.shape == (layout.nbytes,)
            found[entry.id] = view(layout, record)
    return found


def assert_in_precision(parts: dict[str, Tensor], kind: str, own: dict[str, Tensor], module: Any):
    """Values, number formats and error bounds of one record against the expert that it came from."""
    transposed = bool(module.is_transposed)
    back = decode(parts, torch.float32, transposed)
    assert set(back) == set(own)
    for name, weight in own.items():
        if weight.dim() != 2:  # a bias stays as it is
            assert parts[name].dtype == weight.dtype and torch.equal(parts[name], weight)
            continue
        matrix = matrix_of(parts, name)
        assert matrix.kind == kind and parts[name + SCALE].dtype == torch.bfloat16
        assert matrix.columns == weight.shape[0 if transposed else 1]
        error = (back[name] - weight).abs()
        assert matrix.scales is not None
        if kind == "int8":
            step = matrix.scales.float().unsqueeze(1)
            assert matrix.values.abs().amax() == 127
        else:
            step = matrix.scales[..., 0].float().abs().T.repeat_interleave(matrix.group, 1)
        step = (step.T if transposed else step).expand_as(error)
        # Columns make up for each other, so a weight may go a few steps; most go to the nearest number.
        assert float(error.square().mean()) < 0.5 * float(step.square().mean())
        assert error.max() > 0.2 * step.min()


@pytest.mark.parametrize("kind", ["int8", "int4", "int8+int4"])
def test_every_record_is_in_its_precision(
    source: Path, packages: Callable[[str], tuple[Path, Manifest]], kind: str
) -> None:
    package, manifest = packages(kind)
    assert manifest.precision == kind
    assert sorted(layout.precision for layout in manifest.layouts) == sorted(kind.split("+"))
    kinds = {entry.id: manifest.layouts[entry.layout].precision for entry in manifest.prototypes}
    experts = experts_of(source)
    assert len(kinds) == 8 * len(experts)
    for expert, parts in records_of(package, manifest).items():
        module, fused = experts[expert.layer]
        own = {name: tensor[expert.expert] for name, tensor in fused.items()}
        assert_in_precision(parts, kinds[expert], own, module)
    written = sum(manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes)
    assert written == manifest.plan["chosen"]["pool_bytes"], "bytes planned are bytes written"


def test_the_mix_has_the_planned_number_of_wide_records_in_each_scope(
    packages: Callable[[str], tuple[Path, Manifest]],
) -> None:
    _, manifest = packages("int8+int4")
    assert manifest.plan["chosen"]["wide_prototypes"] == WIDE
    layers = sorted({entry.id.layer for entry in manifest.prototypes})
    scopes = [layers[start : start + 2] for start in range(0, len(layers), 2)]
    wide = [
        sum(
            manifest.layouts[entry.layout].precision == "int8"
            for entry in manifest.prototypes
            if entry.id.layer in scope
        )
        for scope in scopes
    ]
    assert tuple(wide) == spread(WIDE, [8 * len(scope) for scope in scopes])


def test_the_receipt_is_that_of_the_written_precision(
    packages: Callable[[str], tuple[Path, Manifest]],
) -> None:
    kinds = ("source", "int8", "int8+int4", "int4")
    lost = {kind: packages(kind)[1].receipt["kl"] for kind in kinds}
    assert lost["source"] < 1e-9 < lost["int8"] < lost["int8+int4"] < lost["int4"]


@pytest.mark.parametrize("source", ["qwen3_moe"], indirect=True)
def test_precision_changes_how_prototypes_are_stored_not_which(
    source: Path, tmp_path: Path
) -> None:
    plain, narrow = (
        fit(source, tmp_path / kind, precision=kind, rate=0.5, scope=2)
        for kind in ("source", "int4")
    )
    assert [entry.id for entry in plain.prototypes] == [entry.id for entry in narrow.prototypes]
    assert plain.slots == narrow.slots


def test_a_weight_that_int4_cannot_take_is_int8() -> None:
    """Not refused, not left in its own numbers: one form milder."""
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError):
        quantise(weight, "int4")
    anatomy = ExpertsAnatomy(
        "experts", 1, 1, (ExpertPart("down_proj", (40, 24), "float32", 3840),), transposed=True
    )
    layout = make_layout(record_parts(anatomy, "int4"), "int4")
    parts = encode(layout, {"down_proj": weight.T.contiguous()}, True)
    assert parts["down_proj"].dtype == torch.int8 and parts["down_proj"].shape == (24, 40)
