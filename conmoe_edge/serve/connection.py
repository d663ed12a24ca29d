"""A connection with time limits, small buffers, and a limit on how many there are.

uvicorn limits the head's size and the idle time between requests. Here, besides:

- A connection without a complete head for ``header_seconds`` is closed; a client that sends a byte a minute would keep
  it. (``guard.py`` times bodies.)
- A connection whose client reads nothing for ``send_seconds`` is dropped, with what it was to get.
- Beyond ``connections``, the one that has been without a request for the longest time makes way for a new one; where
  all are busy the new one gets 503.
- What arrives is read in pieces of ``READ_BYTES``, so that a connection whose requests are not taken in yet holds
  little.

Memory: two timers and about ``READ_BYTES`` a connection, and a head of 16 KiB while it arrives.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from conmoe_edge.serve.http_errors import too_many_connections

READ_BYTES = 16 << 10


class TimedConnection(H11Protocol):
    """uvicorn's connection with clocks on it; made by ``timed``."""

    header_seconds = 10.0
    send_seconds = 60.0
    most = 512

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_clock: asyncio.TimerHandle | None = None
        self._send_clock: asyncio.TimerHandle | None = None
        self.idle_since = time.monotonic()

    def connection_made(self, transport: Any) -> None:
        """The first head is due from now on, where there is a place for the connection."""
        if len(self.connections) >= self.most and not self._make_way():
            self.transport = transport
            transport.write(too_many_connections())
            transport.close()
            return
        if hasattr(transport, "max_size"):  # of asyncio's own transports: bytes of one read
            transport.max_size = READ_BYTES
        super().connection_made(transport)
        self._start_head_clock()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's; nothing of a connection that found no place."""
        if self.flow is not None:
            super().data_received(data)

    def handle_events(self) -> None:
        """As uvicorn's; a request that is complete stops the clock."""
        super().handle_events()
        if self.busy():
            self._stop_head_clock()

    def on_response_complete(self) -> None:
        """The next head is due; or, where the connection closes, that the client takes the rest."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_send_clock()
        elif not self.busy():
            self._start_head_clock()

    def pause_writing(self) -> None:
        """The client does not read: it has ``send_seconds`` for it."""
        super().pause_writing()
        self._start_send_clock()

    def resume_writing(self) -> None:
        """It does read."""
        super().resume_writing()
        self._stop_send_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._stop_head_clock()
        self._stop_send_clock()
        if self.flow is not None:
            super().connection_lost(exc)

    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _make_way(self) -> bool:
        """Drop the connection that has been without a request for the longest time, if any is."""
        idle = [one for one in self.connections if isinstance(one, TimedConnection)]
        oldest = min(
            (one for one in idle if not one.busy()), key=lambda one: one.idle_since, default=None
        )
        if oldest is None:
            return False
        self.connections.discard(oldest)
        oldest.transport.abort()
        return True

    def _start_head_clock(self) -> None:
        self._stop_head_clock()
        self.idle_since = time.monotonic()
        self._head_clock = self.loop.call_later(self.header_seconds, self._head_due)

    def _stop_head_clock(self) -> None:
        if self._head_clock is not None:
            self._head_clock.cancel()
            self._head_clock = None

    def _head_due(self) -> None:
        self._head_clock = None
        if not self.busy():
            self.transport.close()
            self._start_send_clock()

    def _start_send_clock(self) -> None:
        self._stop_send_clock()
        self._send_clock = self.loop.call_later(self.send_seconds, self._send_due)

    def _stop_send_clock(self) -> None:
        if self._send_clock is not None:
            self._send_clock.cancel()
            self._send_clock = None

    def _send_due(self) -> None:
        self._send_clock = None
        self.transport.abort()


def timed(header_seconds: float, send_seconds: float, most: int) -> type[TimedConnection]:
    """The connection class for these limits."""
    limits = {"header_seconds": header_seconds, "send_seconds": send_seconds, "most": most}
    return type("Connection", (TimedConnection,), limits)
