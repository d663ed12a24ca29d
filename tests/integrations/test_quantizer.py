"""Opening a package through transformers."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conmoe_edge import compat
from conmoe_edge.errors import (
    CheckpointError,
    ContextFull,
    DoesNotFit,
    PackageError,
    UnsupportedModel,
    UsageError,
)
from conmoe_edge.integrations.load import load_package
from conmoe_edge.integrations.load_options import LoadOptions, loading, one_device
from conmoe_edge.integrations.memory_plan import default_budget, planned_by
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.experts import find_experts
from conmoe_edge.model.probe import probe
from conmoe_edge.plan.needs import needs_of
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.serialise import plan_to_json
from conmoe_edge.units import parse_size
from tests.families import tiny_model
from tests.hand_packages import identity, write_package, write_unchanged

IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9, 41, 27]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe")
    return write_package(plain, tmp_path_factory.mktemp("package"), identity(plain))


def _budget(nbytes: int) -> Budget:
    return Budget("cpu", nbytes, f"{nbytes}B", "test", host_bytes=0)


def test_two_doors_one_model(folder: Path) -> None:
    ours = load_package(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert theirs.conmoe.stats().resident_share == 1


def test_no_complaint_about_missing_weights(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    info = loaded[1]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert [record.message for record in caplog.records] == []
    err = capfd.readouterr().err
    assert "MISSING" not in err and "newly initialized" not in err and "TP rules" not in err


def test_experts_have_no_weights_left(folder: Path) -> None:
    model = load_package(folder)
    for _, module in find_experts(model).values():
        assert list(module.parameters(recurse=False)) == []
        assert module.config._experts_implementation == "conmoe"
    assert all(not parameter.is_meta for parameter in model.parameters())


def test_a_config_is_untouched_by_the_load(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    before = copy.deepcopy(config.to_dict())
    AutoModelForCausalLM.from_pretrained(folder, config=config)
    after = config.to_dict()
    before.pop("quantization_config")
    after.pop("quantization_config")
    assert before == after


def test_it_can_neither_be_saved_nor_trained(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_package(folder)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "copy")
    assert "Copy the package's folder" in caplog.text
    assert model.hf_quantizer is not None and not model.hf_quantizer.is_trainable
    with pytest.raises(UsageError, match="turned back"):
        model.dequantize()


def test_a_plain_checkpoint_is_not_consolidated_on_the_fly(tmp_path: Path) -> None:
    from conmoe_edge.integrations.quantizer import ConmoeConfig

    tiny_model("olmoe").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="calibration"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ConmoeConfig())


def test_options_do_not_leak(folder: Path) -> None:
    with loading(LoadOptions(slots=(2,))):
        assert AutoModelForCausalLM.from_pretrained(folder).conmoe.stats().slots == 2
    assert AutoModelForCausalLM.from_pretrained(folder).conmoe.stats().slots == 24


def _needs(context: int, chunk: int) -> tuple[int, int]:
    """Fixed bytes and bytes of a record for the tiny model of ``folder``."""
    plain = tiny_model("olmoe")
    anatomy = probe(copy.deepcopy(plain.config))
    dense = sum(t.numel() * 4 for n, t in plain.state_dict().items() if "experts" not in n)
    dense += sum(t.numel() * t.element_size() for t in plain.buffers())
    record = 18432
    needs = needs_of(anatomy, "cpu", context)
    fixed = needs.fixed(record) - anatomy.dense_bytes + dense
    return fixed + needs.workspace(chunk), record


def test_slots_are_what_the_budget_leaves(folder: Path) -> None:
    fixed, record = _needs(context=64, chunk=64)
    for slots in (3, 7, 23):
        model = load_package(
            folder, budget=_budget(fixed + slots * record + record // 2), context=64
        )
        assert model.conmoe.stats().slots == slots
        assert model.conmoe.prefill_chunk == 64
    assert load_package(
        folder, budget=_budget(fixed + 24 * record), context=64
    ).conmoe.residency.all_resident


def test_what_the_caller_holds_beside_the_model_takes_slots(folder: Path) -> None:
    fixed, record = _needs(context=64, chunk=64)
    asked: list[tuple[int, int]] = []

    def beside(budget: int, context: int) -> int:
        asked.append((budget, context))
        return 4 * record

    budget = _budget(fixed + 11 * record + record // 2)
    model = load_package(folder, budget=budget, context=64, beside=beside)
    assert model.conmoe.stats().slots == 7
    assert asked == [(budget.device_bytes, 64)]


def test_a_tight_budget_keeps_the_chunk_and_below_that_is_refused(folder: Path) -> None:
    fixed, record = _needs(context=64, chunk=64)
    model = load_package(folder, budget=_budget(fixed + record), context=64)
    assert (model.conmoe.prefill_chunk, model.conmoe.stats().slots) == (64, 1)
    with pytest.raises(DoesNotFit, match="holds no prototype") as caught:
        load_package(folder, budget=_budget(fixed + record - 1), context=64)
    assert "64 tokens of a prompt" in caught.value.why
    assert f"fit MODEL --gpu {fixed + record - 1}B" in caught.value.fix
    size = next(
        word for word in caught.value.fix.replace(",", " ").split() if word.endswith(("MB", "GB"))
    )
    least = parse_size(size)
    assert least is not None and least < 1.02 * (fixed + record)
    assert load_package(folder, budget=_budget(least), context=64).conmoe.prefill_chunk == 64


def test_the_planned_budget_context_and_chunk_are_the_default(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    planned = make_plan(
        probe(copy.deepcopy(plain.config)), _budget(600_000_000), PlanRequest(context=96)
    )
    folder = write_package(plain, tmp_path, identity(plain), plan=plan_to_json(planned))
    model = load_package(folder)
    assert model.conmoe.budget is not None and model.conmoe.budget.device_bytes == 600_000_000
    assert (model.conmoe.context, model.conmoe.prefill_chunk) == (96, planned.prefill_chunk)
    assert (
        load_package(folder, budget=_budget(700_000_000)).conmoe.prefill_chunk
        == planned.prefill_chunk
    )


def test_a_plan_for_more_than_there_is_here(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    planned = make_plan(
        probe(copy.deepcopy(plain.config)), _budget(10**15), PlanRequest(context=96)
    )
    folder = write_package(plain, tmp_path, identity(plain), plan=plan_to_json(planned))
    read = planned_by(load_package(folder).conmoe.manifest)
    assert read is not None and read.budget.device_bytes == 10**15
    assert default_budget(read, "cpu").device_bytes < 10**15


def test_the_chunk_is_the_manifests_whatever_became_of_the_plan(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    planned = plan_to_json(
        make_plan(probe(copy.deepcopy(plain.config)), _budget(600_000_000), PlanRequest(context=96))
    )
    wanted = planned["prefill_chunk"]
    newer = {**planned, "schema_version": 99, "levers": "of another kind"}
    cases = {
        "named": ({**newer, "prefill_chunk": 7}, 48, 48),
        "older": (planned, None, wanted),
        "of another version": (newer, None, wanted),
        "without a plan": ({}, None, 96),
        "out of range": ({**newer, "prefill_chunk": 10**9}, None, 96),
    }
    for name, (plan, chunk, found) in cases.items():
        folder = write_package(
            plain, tmp_path / name, identity(plain), plan=plan, prefill_chunk=chunk
        )
        model = load_package(folder, slots=(24,), context=96)
        assert model.conmoe.prefill_chunk == found, name


def test_a_model_that_was_left_unchanged(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    planned = make_plan(
        probe(copy.deepcopy(plain.config)), _budget(2_000_000_000), PlanRequest(context=96)
    )
    write_unchanged(plain, tmp_path, plan_to_json(planned))
    model = load_package(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    stats = model.conmoe.stats()
    assert (stats.prototypes, stats.slots, stats.resident_share, stats.hit_rate) == (0, 0, 1, 1)
    assert (model.conmoe.context, stats.memory_budget) == (96, 2_000_000_000)
    with pytest.raises(ContextFull):
        model(IDS.repeat(1, 10))
    with pytest.raises(DoesNotFit, match="left unchanged"):
        load_package(tmp_path, budget=_budget(100_000_000))
    assert not model.conmoe.retreat()
    model.conmoe.close()


def test_one_device_only() -> None:
    assert one_device(None) is None
    assert one_device("cpu") == {"": "cpu"}
    assert one_device({"model": "cpu", "lm_head": "cpu"}) == {"": "cpu"}
    with pytest.raises(UsageError, match="one device"):
        one_device({"model": "cpu", "lm_head": "disk"})


def _damaged(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _edit(folder: Path, change: Any) -> None:
    path = folder / "conmoe.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_release_that_names_the_cache_anew_is_refused_at_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "CACHE_ARGUMENTS", ("what_it_was_called",))
    with pytest.raises(UnsupportedModel, match="OlmoeForCausalLM") as caught:
        load_package(folder)
    assert compat.TRANSFORMERS in caught.value.fix


def test_no_manifest(folder: Path, tmp_path: Path) -> None:
    copied = _damaged(folder, tmp_path)
    (copied / "conmoe.json").unlink()
    with pytest.raises(PackageError, match="no package"):
        load_package(copied)
    with pytest.raises(PackageError, match="no package"):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize(
    "name", ["prototypes-00001-of-00001.safetensors", "dense-00001-of-00001.safetensors"]
)
def test_truncated_files(folder: Path, tmp_path: Path, name: str) -> None:
    copied = _damaged(folder, tmp_path)
    path = copied / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=name):
        load_package(copied)


def test_a_broken_header_of_the_right_size(folder: Path, tmp_path: Path) -> None:
    copied = _damaged(folder, tmp_path)
    path = copied / "dense-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(PackageError):
        load_package(copied)


def test_layers_that_do_not_match(folder: Path, tmp_path: Path) -> None:
    copied = _damaged(folder, tmp_path)
    config = json.loads((copied / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError, match="does not match"):
        load_package(copied)


def test_experts_of_another_width(folder: Path, tmp_path: Path) -> None:
    copied = _damaged(folder, tmp_path)
    config = json.loads((copied / "config.json").read_text())
    config["intermediate_size"] = 40
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError, match="gate_up_proj"):
        load_package(copied)


def test_another_number_of_router_slots(folder: Path, tmp_path: Path) -> None:
    copied = _damaged(folder, tmp_path)
    _edit(copied, lambda value: value["remap"]["1"].append([0, 0]))
    with pytest.raises(PackageError, match="router slots"):
        load_package(copied)


def test_missing_dense_weights(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    copied = write_package(plain, tmp_path, identity(plain))
    config = json.loads((copied / "config.json").read_text())
    config["attention_bias"] = True
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError, match=r"k_proj\.bias is missing"):
        load_package(copied)
