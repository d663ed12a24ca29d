"""Budgets of GPUs that are not NVIDIA's: one pool where the memory is the RAM, two where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.memory.bandwidth import Meter
from conmoe_edge.memory.machine import GpuFacts, MachineFacts
from conmoe_edge.memory.resolve import resolve_budget
from conmoe_edge.model.accelerator import apple_facts, card_facts
from conmoe_edge.units import GIB, MIB

HERE = MachineFacts(
    ram_total=32 * GIB,
    ram_available=20 * GIB,
    cgroup_limit=None,
    cgroup_available=None,
    physical_cores=8,
    gpu=None,
    gpu_problem="torch finds nothing but the processor",
    disk_free=100 * GIB,
)
APPLE = replace(HERE, system="darwin", gpu=apple_facts(21845 * MIB, HERE))
"""A Mac with 32 GiB, as Metal describes it."""


def _card(word: str, shares: bool, **more: Any) -> MachineFacts:
    given = {"free": 15 * GIB, "total": 16 * GIB, "held": GIB // 2, **more}
    gpu = card_facts(word, "a card", shares=shares, here=HERE, **given)
    return replace(HERE, gpu=gpu)


def test_an_apple_gpu_and_the_processor_have_one_pool() -> None:
    budget = resolve_budget("auto", "mps", facts=APPLE)
    assert budget.device == "mps"
    assert (
        budget.device_bytes == 18 * GIB
    )  # nine tenths of what is free, less than the 21.3 GiB it may take
    assert budget.host_bytes == 0 and budget.above_disk
    assert "shares the RAM" in budget.source
    full = replace(APPLE, ram_available=30 * GIB)
    assert resolve_budget("auto", "mps", facts=full).device_bytes == 21845 * MIB
    size = resolve_budget("8GiB", "mps", facts=APPLE)
    assert (size.device_bytes, size.host_bytes) == (8 * GIB, 0)
    assert size.without_measurements().host_bytes == 0
    more = resolve_budget("24GiB", "mps", facts=APPLE)
    assert "20.00 GiB can be had now" in more.here


def test_rates_of_a_shared_pool_are_the_ram_and_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "memory", lambda self: 100e9)
    monkeypatch.setattr(Meter, "disk", lambda self: 3e9)
    budget = resolve_budget("8GiB", "mps", facts=APPLE, meter=Meter(tmp_path))
    assert (budget.device_bandwidth, budget.link_bandwidth, budget.disk_bandwidth) == (
        100e9,
        3e9,
        3e9,
    )
    card = resolve_budget("8GiB", "xpu", facts=_card("xpu", False), meter=Meter(tmp_path))
    assert (card.device_bandwidth, card.disk_bandwidth) == (None, 3e9)


@pytest.mark.parametrize(("word", "kind"), [("hip", "cuda"), ("xpu", "xpu")])
def test_a_card_has_memory_of_its_own(word: str, kind: str) -> None:
    facts = _card(word, False)
    assert facts.gpu is not None and facts.gpu.used_by_others == GIB // 2
    budget = resolve_budget("auto", word, facts=facts)  # type: ignore[arg-type]
    assert budget.device == kind
    assert 15 * GIB < budget.device_bytes < 15.5 * GIB
    assert budget.host_bytes == 20 * GIB and not budget.above_disk
    windows = replace(facts, system="windows")
    assert resolve_budget("auto", word, facts=windows).host_bytes == 16 * GIB  # type: ignore[arg-type]


def test_a_gpu_on_the_processors_chip_is_counted_once() -> None:
    facts = _card("hip", True, total=28 * GIB, free=27 * GIB)
    budget = resolve_budget("auto", "hip", facts=facts)
    assert (budget.device_bytes, budget.host_bytes) == (18 * GIB, 0)
    assert resolve_budget("auto", "auto", facts=facts).device == "cuda"


@pytest.mark.parametrize("word", ["mps", "xpu", "hip"])
def test_what_is_not_here_is_refused_in_one_line_and_may_be_a_target(word: Any) -> None:
    with pytest.raises(UsageError, match=f"This machine has no {word} device"):
        resolve_budget("auto", word, facts=HERE)
    target = resolve_budget("8GB", word, facts=HERE)
    assert target.device == ("cuda" if word == "hip" else word)
    assert f"this machine has no {word} device, so the target is another one" in target.here
    assert target.host_bytes == (0 if word == "mps" else None)


def test_another_gpu_is_not_taken_for_the_one_that_was_asked_for() -> None:
    nvidia = replace(HERE, gpu=GpuFacts("RTX", 8 * GIB, 8 * GIB, 0))
    with pytest.raises(UsageError, match="no mps device"):
        resolve_budget("auto", "mps", facts=nvidia)
    assert "another one" in resolve_budget("4GB", "xpu", facts=nvidia).here
