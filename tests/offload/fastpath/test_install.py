"""What a model has got is said, and stays true."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.fastpath import install as module_of_install
from conmoe_edge.offload.fastpath import supported
from conmoe_edge.offload.fastpath.install import install
from conmoe_edge.offload.fastpath.report import FastPathWarning, warn_once
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import tiny_model
from tests.hand_packages import identity, write_package
from tests.offload.fastpath.single_tokens import installed, steps

pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")


def package(name: str, folder: Path, **changes: Any) -> Any:
    plain = tiny_model(name, dtype=torch.bfloat16, **changes)
    return load_package(write_package(plain, folder, identity(plain)))


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("olmoe", "native, 3 of 3 layers in one call"),
        ("deepseek_v3", "native, 3 of 3 layers in one call"),
        (
            "gpt_oss",
            "native, 3 of 3 layers in two calls: the operator does not take its experts",
        ),
        (
            "qwen3_next",
            "native, 1 of 3 layers in one call: Qwen3NextGatedDeltaNet is not on the list",
        ),
        (
            "minimax",
            "native products only: MiniMaxLightningAttention is not on the list; "
            "MiniMaxAttention is not on the list",
        ),
    ],
)
def test_summaries(name: str, summary: str, tmp_path: Path) -> None:
    report = package(name, tmp_path).conmoe.fast_path
    assert report.summary == summary
    said = json.loads(json.dumps(report.to_json()))
    assert said["summary"] == summary and len(said["layers"]) == 3


@pytest.mark.parametrize(
    ("machine", "dtype", "summary"),
    [
        (
            Machine("cpu", True),
            torch.float32,
            "transformers' own steps: the model computes in float32",
        ),
        (Machine("cuda", True), torch.bfloat16, "not on cuda: it is for CPUs"),
    ],
)
def test_where_it_is_not(machine: Machine, dtype: torch.dtype, summary: str) -> None:
    model: Any = tiny_model("olmoe", dtype=dtype)
    report = install(model, machine, 64)
    assert report.summary == summary and {one.live for one in report.layers} == {"none"}


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_install, "operator", lambda: None)
    monkeypatch.setattr(module_of_install, "why_not", lambda: "there is no compiler")
    report = install(tiny_model("olmoe", dtype=torch.bfloat16), Machine("cpu", True), 64)
    assert report.summary == "torch's own kernels: there is no compiler"


def test_a_cache_with_a_window_is_said(tmp_path: Path) -> None:
    model = package("mixtral", tmp_path / "one", sliding_window=8)
    assert model.conmoe.fast_path.summary == "native products only: its cache has a window"
    steps(model, [3, 1, 4])
    assert model.conmoe.fast_path.live()["transformers"] == 9
    assert package("exaone_moe", tmp_path / "two").conmoe.fast_path.summary.endswith("in one call")


def test_counts_show_what_has_answered(tmp_path: Path) -> None:
    model = package("olmoe", tmp_path)
    live = model.conmoe.fast_path.live
    assert set(live().values()) == {0}
    _, cache = steps(model, [3, 1, 4])  # the first token is compared, and computed again
    assert live() == {
        "tokens": 3,
        "layer": 9,
        "together": 0,
        "block": 0,
        "attention": 0,
        "transformers": 0,
    }
    hook = model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    _, cache = steps(model, [1, 5], cache)
    hook.remove()
    assert live() == {
        "tokens": 5,
        "layer": 13,
        "together": 0,
        "block": 0,
        "attention": 2,
        "transformers": 0,
    }
    model.model.layers[2].mlp.gate.register_forward_hook(lambda *_: None)
    _, cache = steps(model, [9], cache)
    assert live()["layer"] == 15 and live()["block"] == 1


def test_a_listed_class_with_other_code_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "olmoe.OlmoeDecoderLayer"
    monkeypatch.setitem(supported.LISTED, name, (supported.LISTED[name][0], ("0" * 16,)))
    warn_once.cache_clear()
    with pytest.warns(FastPathWarning, match="OlmoeDecoderLayer of transformers") as seen:
        _, report = installed("olmoe")
        installed("olmoe")
    assert len(seen) == 1
    assert {one.live for one in report.layers} == {"attention"}
    assert "not the code that was checked" in report.summary


def test_no_warning_where_all_is_well(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastPathWarning)
        package("olmoe", tmp_path)


def test_one_hook_in_front_of_the_model_and_one_behind() -> None:
    model, _ = installed("olmoe")
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
