"""What ``doctor`` says of each system, of its disks and of GPUs that are not NVIDIA's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conmoe_edge.api import diagnosing_system
from conmoe_edge.api.diagnosing_system import (
    LACKS,
    accelerator_findings,
    lacking,
    limit_findings,
    reads_finding,
)
from conmoe_edge.memory.machine import GpuFacts, MachineFacts
from conmoe_edge.units import GIB

HERE = MachineFacts(32 * GIB, 20 * GIB, None, None, 8, None, "none", GIB)


@pytest.mark.parametrize("system", LACKS)
def test_what_a_system_lacks_is_said_with_its_cost(system: str) -> None:
    found = list(lacking(system))
    assert len(found) == (len(LACKS[system]) + 1 if LACKS[system] else 0)
    for one in found[1:]:
        assert one.status == "info" and ": " in one.text
    assert [one.name for one in lacking("freebsd14")] == ["system"]


def test_direct_reads_are_tried_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reads_finding(tmp_path)
    assert found.text.startswith(("direct (", "buffered: the disk of"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(diagnosing_system, "opened_directly", lambda handle: None)
    assert "refuses" in reads_finding(tmp_path).text
    monkeypatch.setattr(diagnosing_system, "direct_way", lambda: "")
    assert "this system has no direct reads" in reads_finding(tmp_path).text
    monkeypatch.undo()
    assert "not tried" in reads_finding(tmp_path / "absent").text


def test_page_locked_memory_of_windows() -> None:
    card = replace(HERE, gpu=GpuFacts("RTX", 8 * GIB, 8 * GIB, 0))
    assert list(limit_findings(card)) == []
    windows = replace(card, system="windows")
    (found,) = limit_findings(windows)
    assert found.name == "page-locked" and "16.00 GiB of 20.00 GiB" in found.text


def test_an_experimental_accelerator_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from conmoe_edge.model import accelerator

    assert list(accelerator_findings(HERE)) == [] or accelerator.accelerator_here() != "cuda"
    gpu = accelerator.apple_facts(21 * GIB, HERE)
    monkeypatch.setattr(accelerator, "accelerator_here", lambda: "mps")
    monkeypatch.setattr(accelerator, "gpu_facts", lambda word, here: gpu)
    (found,) = accelerator_findings(HERE)
    assert "experimental" in found.text and "--device mps" in found.text
    assert "shared with the processor" in found.text
