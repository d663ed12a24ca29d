"""A connection with a time limit for a request's head.

uvicorn limits the head's size and the idle time between requests, not how long a head may take: a
client that sends a byte a minute would keep its connection. Here a connection without a complete head
for ``header_seconds`` is closed. (``guard.py`` times bodies.) Memory: one timer a connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedConnection(H11Protocol):
    """uvicorn's connection with a clock on it; made by ``timed``."""

    header_seconds = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The first head is due from now on."""
        super().connection_made(transport)
        self._start_clock()

    def handle_events(self) -> None:
        """As uvicorn's; a request that is complete stops the clock."""
        super().handle_events()
        if self._busy():
            self._stop_clock()

    def on_response_complete(self) -> None:
        """The next head is due."""
        super().on_response_complete()
        if not self.transport.is_closing() and not self._busy():
            self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._stop_clock()
        super().connection_lost(exc)

    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_clock(self) -> None:
        self._stop_clock()
        self._clock = self.loop.call_later(self.header_seconds, self._due)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _due(self) -> None:
        self._clock = None
        if not self._busy():
            self.transport.close()


def timed(seconds: float) -> type[TimedConnection]:
    """The connection class for heads that may take ``seconds``."""
    return type("Connection", (TimedConnection,), {"header_seconds": seconds})
