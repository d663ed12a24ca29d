"""Which instruction set the operator is compiled for, and that its code is that one's."""

from __future__ import annotations

import platform
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from conmoe_edge.offload.kernels.cpu import build, levels
from conmoe_edge.offload.kernels.cpu.bindings import Operator
from conmoe_edge.offload.kernels.cpu.levels import best_level, levels_here, levels_of

x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="of x86-64")
AVX2 = ("fma", "avx2", "bmi1", "bmi2", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(levels.FORCED, raising=False)


def having(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    """This processor has these alone."""
    monkeypatch.setattr(levels, "features", lambda: frozenset(features))


def test_the_code_of_a_library_is_that_of_its_level(
    operator: Operator, request: pytest.FixtureRequest
) -> None:
    """Not what the compiler was told, but what the source made of it."""
    name = request.node.callspec.params["operator"]
    assert operator.level == name and operator.name == f"native, {name}"


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64", "riscv64"])
def test_best_first_and_the_last_one_is_for_all(machine: str) -> None:
    found = levels_of(machine)
    assert len({one.name for one in found}) == len(found) and not found[-1].needs
    for better, other in pairwise(found):
        assert not better.needs <= other.needs


@x86
def test_the_best_that_a_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch)
    assert best_level().name == "plain"
    having(monkeypatch, "sse2", "avx", "avx2", "fma")
    assert best_level().name == "plain"
    having(monkeypatch, *AVX2)
    assert best_level().name == "avx2"
    having(monkeypatch, *AVX2, "avxvnni")
    assert best_level().name == "avx-vnni"
    having(monkeypatch, *AVX512)
    assert best_level().name == "avx512"
    having(monkeypatch, *AVX512, "avx512vnni", "avxvnni")
    assert [one.name for one in levels_here()] == [one.name for one in levels_of("x86_64")]


@x86
def test_another_level_is_used_or_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch, *AVX2)
    monkeypatch.setenv(levels.FORCED, "plain")
    assert best_level().name == "plain"
    monkeypatch.setenv(levels.FORCED, "avx512")
    with pytest.raises(
        build.Unavailable, match=r"LEVEL=avx512: this processor does not .*avx2, plain"
    ):
        build.library()
    monkeypatch.setenv(levels.FORCED, "AVX9")
    with pytest.raises(build.Unavailable, match="LEVEL=AVX9: there is no such level"):
        build.library()


def flags_of_linux() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        pytest.skip("no /proc/cpuinfo here")
    words = next((one for one in lines if one.startswith("flags")), "").split()
    return {one.replace("_", "") for one in words}


@x86
def test_torch_and_linux_say_the_same() -> None:
    there = flags_of_linux()
    needed = frozenset[str]().union(*(one.needs for one in levels_of("x86_64")))
    assert {*levels.features()} & needed == there & needed


@x86
def test_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the function that says what the processor has."""
    flags_of_linux()
    expected = levels_here()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(levels, "features", levels.features.__wrapped__)  # type: ignore[attr-defined]
    assert levels_here() == expected
    monkeypatch.setattr(Path, "read_text", no_such_file)
    assert levels_here()[-1].name == "plain"
    assert (expected[0].needs >= levels._V3) == (levels_here()[0].needs >= levels._V3)


def no_such_file(*_: object, **__: object) -> str:
    raise FileNotFoundError
