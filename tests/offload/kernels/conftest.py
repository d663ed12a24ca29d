"""The compiled operator in every instruction set that this processor has."""

from __future__ import annotations

import ctypes

import pytest

from conmoe_edge.offload.kernels.cpu import build
from conmoe_edge.offload.kernels.cpu.bindings import Operator

MARCHES = {"AVX-512": "-march=native", "AVX2": "-march=x86-64-v3", "plain": "-march=x86-64"}


@pytest.fixture(scope="session", params=sorted(MARCHES))
def operator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """The operator as processors with these instructions get it."""
    cache = tmp_path_factory.mktemp("operator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        flags = [MARCHES[request.param] if f.startswith("-march") else f for f in build._FLAGS]
        patch.setattr(build, "_FLAGS", tuple(flags))
        try:
            path = build.library()
        except build.Unavailable as error:
            pytest.skip(str(error))
    return Operator(ctypes.CDLL(str(path)))
