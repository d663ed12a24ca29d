"""The compiled operator in every instruction set that this processor has."""

from __future__ import annotations

import ctypes
import platform

import pytest

from conmoe_edge.offload.kernels.cpu import build, levels
from conmoe_edge.offload.kernels.cpu.bindings import Operator


@pytest.fixture(scope="session", params=[one.name for one in levels.levels_of(platform.machine())])
def operator(request: pytest.FixtureRequest) -> Operator:
    """The operator as processors with these instructions get it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(levels.FORCED, request.param)
        try:
            path = build.library()
        except build.Unavailable as error:
            pytest.skip(str(error))
    return Operator(ctypes.CDLL(str(path)))
