"""The compiler of the libraries that wheels bring."""

from __future__ import annotations

import pytest

from conmoe_edge.offload.kernels.cpu.compilers import Compiler, zig


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    found = zig()
    if found is None:
        pytest.skip("ziglang is not installed")
    return found
