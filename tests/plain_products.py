"""Products in the format of the activations: a process as it is where the compiled operator is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from conmoe_edge.offload.kernels.cpu import bindings, build


@contextmanager
def without_operator() -> Iterator[None]:
    """Packages loaded here are computed by torch, which rounds no activations of a prompt to 8 bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(build.SWITCH, "off")
        bindings._state.cache_clear()
        try:
            yield
        finally:
            patch.undo()
            bindings._state.cache_clear()
