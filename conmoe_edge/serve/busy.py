"""Why a request is not taken in. No torch."""

from __future__ import annotations

from typing import Literal


class Busy(Exception):
    """No more can be taken in: the queue is full, or the engine is not (or no longer) there."""

    def __init__(
        self, reason: Literal["full", "loading", "stopping"], retry_after: int = 1
    ) -> None:
        self.reason = reason
        self.retry_after = retry_after
        super().__init__(reason)
