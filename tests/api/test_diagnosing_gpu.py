"""What ``doctor`` says about GPUs, for drivers and builds of torch that are as described."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from conmoe_edge.api import diagnosing_gpu
from conmoe_edge.api.diagnosing_gpu import Gpu
from conmoe_edge.api.finding import Finding
from conmoe_edge.units import GIB


def found(
    monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], *, build: str | None, usable: bool
) -> list[Finding]:
    torch = SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=build),
        cuda=SimpleNamespace(
            is_available=lambda: usable,
            get_device_capability=lambda index: (8, 9),
            get_arch_list=lambda: ["sm_80", "sm_90"],
            get_device_name=lambda index: "a GPU",
        ),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(diagnosing_gpu, "read_gpus", lambda: (gpus, "580.1"))
    return list(diagnosing_gpu.gpu_findings("no driver"))


CARD = Gpu("RTX 4090", 24 * GIB, 20 * GIB, (("Xorg", 812, GIB), ("python", 99, 3 * GIB)))


def test_without_a_gpu_the_cpu_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = found(monkeypatch, [], build=None, usable=False)
    assert (check.status, check.fix) == ("info", "")
    assert "no driver" in check.text


def test_a_gpu_that_works_names_who_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, card = found(monkeypatch, [CARD], build="12.8", usable=True)
    assert cuda.status == "ok"
    assert card.status == "ok"
    assert "Xorg (pid 812, 1.00 GiB)" in card.text
    full = Gpu("RTX 4090", 24 * GIB, 2 * GIB, ())
    assert found(monkeypatch, [full], build="12.8", usable=True)[1].status == "warn"


def test_torch_without_cuda_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    check = found(monkeypatch, [CARD], build=None, usable=False)[0]
    assert check.status == "warn"
    assert "without CUDA" in check.text
    assert check.fix


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    check = found(monkeypatch, [CARD], build="13.0", usable=False)[0]
    assert check.status == "fail"
    assert "580.1" in check.text
