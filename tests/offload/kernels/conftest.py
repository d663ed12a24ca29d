"""The compiled operator in every instruction set that this processor has."""

from __future__ import annotations

import ctypes

import pytest

from conmoe_edge.offload.kernels.cpu import build, levels
from conmoe_edge.offload.kernels.cpu.bindings import Operator
from conmoe_edge.offload.kernels.cpu.compilers import compilers


@pytest.fixture(scope="session", params=[one.name for one in levels.levels_here()])
def operator(request: pytest.FixtureRequest) -> Operator:
    """The operator as processors with these instructions get it. Where there is a compiler, it compiles."""
    if next(compilers(), None) is None:
        pytest.skip("there is no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(build.SWITCH, raising=False)
        patch.setenv(levels.FORCED, request.param)
        path = build.library()
    return Operator(ctypes.CDLL(str(path)))
