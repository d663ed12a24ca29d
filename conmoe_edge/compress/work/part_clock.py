"""Seconds by part, for the report at the end of a fit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up wall-clock seconds by name; of a part inside of another they count for the inner one alone."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})
        self._inside: list[float] = []  # of each part that is running, what its inner ones took

    def add(self, part: str, seconds: float) -> None:
        """Count ``seconds`` for ``part``."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        if self._inside:
            self._inside[-1] += seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the block for ``name``."""
        self._inside.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            inner = self._inside.pop()
            self.add(name, spent - inner)
            if self._inside:
                self._inside[-1] += inner
