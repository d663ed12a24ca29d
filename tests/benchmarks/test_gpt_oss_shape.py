"""The true shape of gpt-oss-20b: what a plan says of it, and that the files of a small one are a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.make_gpt_oss_shape import Shape, make
from conmoe_edge import api
from conmoe_edge.checkpoint.quantised.stored import Stored
from conmoe_edge.checkpoint.sources.locate import locate
from conmoe_edge.cli.main import main
from conmoe_edge.memory.resolve import resolve_budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.model.opened import open_model
from conmoe_edge.model.probe import probe
from conmoe_edge.model.source_facts import read_source
from conmoe_edge.plan.levers import precisions
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest

TINY = Shape(
    layers=2, experts=4, top_k=2, hidden=64, width=64, heads=4, kv_heads=2, head_dim=16, vocab=4096
)
DTYPES = {"BF16": "bfloat16", "U8": "uint8"}


@pytest.fixture(scope="module")
def true_shape(tmp_path_factory: pytest.TempPathFactory) -> ModelAnatomy:
    """From headers alone."""
    folder, shape = tmp_path_factory.mktemp("shape"), Shape()
    (folder / "config.json").write_text(json.dumps(shape.config()))
    stored = {one.name: Stored(DTYPES[one.dtype], one.nbytes, one.shape) for one in shape.tensors()}
    facts = read_source(folder, stored)
    return probe(facts.config, facts.facts)


def _plan(anatomy: ModelAnatomy, size: str) -> Plan:
    budget = resolve_budget(size, "cpu")
    return make_plan(anatomy, budget, PlanRequest(budget=size, device="cpu"), trims=True)


def test_the_plan_counts_in_the_bytes_of_the_checkpoint(true_shape: ModelAnatomy) -> None:
    assert true_shape.total_bytes == sum(one.nbytes for one in Shape().tensors()) == 13_761_264_768


def test_it_fits_16_gb_as_it_is_and_8_gb_consolidated(true_shape: ModelAnatomy) -> None:
    whole, half = _plan(true_shape, "16GB"), _plan(true_shape, "8GB")
    assert (whole.chosen.precision, whole.chosen.rate) == ("mxfp4", 0.0)
    assert whole.chosen.slots == whole.chosen.prototypes == 24 * 32
    # Of a record, all but its last page is the checkpoint's.
    assert 0 <= whole.disk_bytes - true_shape.total_bytes < 24 * 32 * 4096
    assert (half.chosen.precision, half.chosen.rate) == ("free", 0.0)
    assert half.dense_precision in ("q6", "q4")
    assert 2.0 < half.chosen.bits < 3.0 and half.chosen.resident_share == 1.0


def test_a_stopped_run_goes_on_with_its_shard(tmp_path: Path) -> None:
    limit = 1 << 19
    total = make(tmp_path / "whole", TINY, 0, limit)
    assert total == sum(one.nbytes for one in TINY.tensors())
    files = {one.name: one.read_bytes() for one in sorted((tmp_path / "whole").iterdir())}
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2
    again = tmp_path / "again"
    again.mkdir()
    for name in ("begun.json", shards[0]):
        (again / name).write_bytes(files[name])
    (again / f"{shards[1]}.part").write_bytes(b"half of it")
    first = (again / shards[0]).stat().st_mtime_ns
    assert make(again, TINY, 0, limit) == total
    assert (again / shards[0]).stat().st_mtime_ns == first
    assert {one.name: one.read_bytes() for one in sorted(again.iterdir())} == files
    with pytest.raises(ValueError, match="other settings"):
        make(again, TINY, 1, limit)


def test_a_small_one_is_a_model_and_fit_says_that_it_stays(tmp_path: Path) -> None:
    make(tmp_path / "model", TINY, 0, 1 << 30)
    report = api.plan(str(tmp_path / "model"), budget="4GB", device="cpu")
    assert report.anatomy.total_bytes == sum(one.nbytes for one in TINY.tensors())
    command = ["fit", str(tmp_path / "model"), "--gpu", "4GB", "--device", "cpu", "--yes"]
    command += ["--calibration-tokens", "512"]
    same = "every weight as in the model"
    for flags, said in (([], True), (["--rate", "0.5"], False)):
        words = [*command, *flags, "--out", str(tmp_path / str(said))]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        assert (same in done.output) == said, done.output
        assert "bf16 and mxfp4" in done.output
    assert "fits in MXFP4 as published, nothing is removed" in report.plan.chosen.reason


def test_the_gguf_for_llama_cpp_has_the_same_numbers(tmp_path: Path) -> None:
    """Read back by the project's own reader of GGUF; half of the experts are the first ones."""
    pytest.importorskip("gguf")
    from benchmarks.comparison.gpt_oss_gguf import write

    make(tmp_path / "model", TINY, 0, 1 << 30)
    write(tmp_path / "model", tmp_path / "whole.gguf", None)
    write(tmp_path / "model", tmp_path / "half.gguf", 2)
    source, whole, half = (
        open_model(locate(str(tmp_path / name))) for name in ("model", "whole.gguf", "half.gguf")
    )
    assert precisions(whole.anatomy, "auto") == precisions(half.anatomy, "auto") == ("mxfp4",)
    assert (
        half.anatomy.expert_count * 2 == whole.anatomy.expert_count == source.anatomy.expert_count
    )
    with source.tensors() as wanted, whole.tensors() as found, half.tensors() as first:
        assert set(found) == set(wanted)
        for name in wanted:
            tensor = wanted[name][...].float()
            assert torch.equal(found[name][...].float(), tensor), name
            fewer = tensor[:2] if ".experts." in name or ".router." in name else tensor
            assert torch.equal(first[name][...].float(), fewer), name
