"""Which device a word means here, and what is said where there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from conmoe_edge.errors import UsageError
from conmoe_edge.memory.machine import MachineFacts
from conmoe_edge.model import accelerator
from conmoe_edge.model.accelerator import (
    budget_here,
    device_named,
    experimental,
    facts_for,
    gpu_facts,
    memory_used,
)
from conmoe_edge.units import GIB

ABSENT = [word for word in ("cuda", "hip", "mps", "xpu") if word != accelerator.accelerator_here()]


@pytest.mark.parametrize("word", ABSENT)
def test_a_device_that_is_not_here_is_refused_in_one_line(word: str) -> None:
    if word == "cuda" and torch.cuda.is_available():
        pytest.skip("torch calls AMD's GPU so")
    with pytest.raises(UsageError) as caught:
        device_named(word)
    if word != "cuda":
        assert caught.value.what == f"This machine has no {word} device."
        assert torch.__version__ in caught.value.why
    assert "--device cpu" in caught.value.fix


def test_the_processor_and_words_that_mean_nothing() -> None:
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="is no device"):
        device_named("gpu7")
    assert experimental(torch.device("cpu")) is None
    assert experimental(torch.device("mps")) == "mps"


@pytest.mark.parametrize("word", [one for one in ABSENT if one in accelerator.EXPERIMENTAL])
def test_facts_of_a_machine_without_it(word: str) -> None:
    facts = facts_for(word)
    assert facts.gpu is None and torch.__version__ in facts.gpu_problem
    with pytest.raises(UsageError, match=f"no {word} device"):
        budget_here("auto", word)


def test_facts_of_an_apple_gpu_are_what_metal_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own calls cannot answer here, so their answers of a Mac with 16 GiB are given."""
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10922 << 20)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 1 << 30)
    here = MachineFacts(16 * GIB, 6 * GIB, None, None, 8, None, "", GIB, "darwin")
    found = gpu_facts("mps", here)
    assert (found.total, found.free, found.kind, found.unified) == (
        10922 << 20,
        6 * GIB,
        "mps",
        True,
    )
    assert memory_used(torch.device("mps"), 2 << 30) == 3 << 30
    assert memory_used(torch.device("cpu"), 2 << 30) == 2 << 30


def test_a_rocm_build_of_torch_is_an_amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    assert accelerator.accelerator_here() == "hip"
    assert experimental(torch.device("cuda", 0)) == "hip"
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (11 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda _: GIB // 4)
    card = SimpleNamespace(is_integrated=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Radeon")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    budget = budget_here("auto", "auto")
    assert budget.device == "cuda" and "Radeon" in budget.source
    assert device_named("hip") == device_named("cuda") == torch.device("cuda", 0)
    with pytest.raises(UsageError, match="no mps device"):
        device_named("mps")
