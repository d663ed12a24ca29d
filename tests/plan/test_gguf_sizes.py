"""What a quantised GGUF file takes, and how wide experts may be in it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from llama import llama_python, needs_llama

from conmoe_edge import api
from conmoe_edge.checkpoint.sources.locate import find
from conmoe_edge.errors import DoesNotFit, UsageError
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import DenseMatrix, ModelAnatomy
from conmoe_edge.model.opened import open_model
from conmoe_edge.plan.gguf_sizes import gguf_sizes, step_of
from conmoe_edge.plan.gguf_types import FILE_TYPES, FORMATS, matrix_bytes
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.serving import request_for
from conmoe_edge.units import parse_size


@pytest.fixture
def olmoe(olmoe) -> ModelAnatomy:
    """OLMoE with its attention and its head as matrices."""
    attention = tuple(
        DenseMatrix(layer.index, 2048, 2048, 2 * 2048 * 2048)
        for layer in olmoe.layers
        for _ in range(4)
    )
    head = DenseMatrix(None, 50304, 2048, 2 * 50304 * 2048)
    return replace(olmoe, dense_matrices=(*attention, head))


def planned(anatomy, size: str, kind: str, **more) -> Plan:
    request = request_for("gguf", PlanRequest(engine="gguf", quantise=kind, **more))
    return make_plan(anatomy, Budget("cpu", parse_size(size), size, "test"), request)


def test_blocks_and_what_takes_their_place() -> None:
    assert matrix_bytes("Q8_0", 10, 64) == 10 * 2 * 34
    assert matrix_bytes("Q4_K", 10, 512) == 10 * 2 * 144
    assert matrix_bytes("Q4_K", 10, 96) == matrix_bytes("Q5_0", 10, 96) == 10 * 3 * 22
    assert matrix_bytes("Q6_K", 4, 40) == 4 * 40 * 2  # by way of Q8_0, which has blocks of 32
    assert all(one.otherwise in FORMATS for one in FORMATS.values())
    assert all({one.most, one.down, one.head} <= set(FORMATS) for one in FILE_TYPES.values())


def test_experts_are_narrowed_by_whole_blocks(olmoe) -> None:
    assert (step_of("Q4_K_M", 1024), step_of("Q4_K_M", 2880), step_of("Q4_K_M", 96)) == (
        256,
        256,
        32,
    )
    assert step_of("Q8_0", 1024) == step_of("MXFP4_MOE", 2880) == 32
    # OLMoE-1B-7B in Q4_K_M is published with 4.21 GB
    assert gguf_sizes(olmoe, "Q4_K_M").file == pytest.approx(4.21e9, rel=0.01)
    plan = planned(olmoe, "4.5GB", "Q4_K_M")
    assert plan.chosen.width == 768 and plan.chosen.resident_share == 1.0
    widths = [one.width for one in plan.candidates]
    assert widths == [1024, 768, 512, 256, *range(224, 0, -32)]
    assert "about" in plan.chosen.reason and "Q4_K_M" in plan.chosen.reason


def test_the_budget_is_that_of_the_file_and_the_disk_that_of_the_package(olmoe) -> None:
    plan = planned(olmoe, "4.5GB", "Q4_K_M")
    plain = make_plan(
        olmoe,
        Budget("cpu", 16 * 10**9, "16GB", "test"),
        request_for("gguf", PlanRequest(engine="gguf", rate=0.25)),
    )
    assert plain.chosen.width == plan.chosen.width
    assert plain.disk_bytes == plan.disk_bytes > 4 * 10**9
    terms = {term.name: term.nbytes for term in plan.terms}
    plain_terms = {term.name: term.nbytes for term in plain.terms}
    assert terms["Dense weights"] < 0.5 * plain_terms["Dense weights"]
    assert planned(olmoe, "6GB", "Q4_K_M").unchanged


def test_a_larger_budget_or_a_smaller_type_never_gives_narrower_experts(olmoe) -> None:
    for kind in ("Q8_0", "Q4_K_M", "Q2_K"):
        widths = [planned(olmoe, f"{size / 4}GB", kind).chosen.width for size in range(10, 33, 2)]
        assert widths == sorted(widths)
    by_type = [planned(olmoe, "4.5GB", kind).chosen.width for kind in ("Q8_0", "Q5_K_M", "Q3_K_S")]
    assert by_type == sorted(by_type)


def test_the_least_budget_that_is_named_works(olmoe) -> None:
    with pytest.raises(DoesNotFit) as caught:
        planned(olmoe, "600MB", "Q4_K_M")
    found = re.search(r"--gpu (\S+) is the least", caught.value.fix)
    assert found is not None
    assert planned(olmoe, found[1], "Q4_K_M").chosen.width == 32


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="--quantise Q8_0 is about a GGUF file"):
        PlanRequest(quantise="Q8_0", engine="hf")
    with pytest.raises(UsageError, match="no type 'Q9_K'"):
        PlanRequest(quantise="Q9_K", engine="gguf")


@needs_llama
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_the_size_is_about_that_of_the_file(kind: str, tmp_path: Path) -> None:
    """The demo model: its heads are repeated (2 %) and its vocabulary takes 1 %."""
    found = gguf_sizes(open_model(find("demo")).anatomy, kind).file
    api.fit("demo", tmp_path / "package", budget="2GB", device="cpu", engine="gguf")
    done = api.export(
        tmp_path / "package",
        tmp_path / "out.gguf",
        form="gguf",
        quantise=kind,
        imatrix=False,
        llama_python=llama_python(),
    )
    assert found == pytest.approx(done.nbytes, rel=0.05)
