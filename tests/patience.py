"""How long a test waits for what has to come. A machine that is ten times slower than usual, or that stands still for a
while, fails no test; only what never comes does."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 600.0
"""Seconds, below the limit of a test (``timeout`` in ``pyproject.toml``). No test that passes waits so long."""
_LOOK_SECONDS = 0.02


def wait_for(condition: Callable[[], object], told: Callable[[], object] = lambda: "") -> None:
    """Until ``condition`` is true.

    Raises:
        AssertionError: it did not become true; says what ``told`` gives.
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(_LOOK_SECONDS)
