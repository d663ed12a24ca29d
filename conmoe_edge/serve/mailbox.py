"""The events of one answer on their way from the engine's thread to the client's coroutine.

Pieces that nobody has taken yet become one, so that an answer whose client does not read takes the bytes of its text
and no more. Memory: that text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from conmoe_edge.serve.jobs import Event, Piece


class Mailbox:
    """Filled from any thread, emptied on the event loop that made it."""

    def __init__(self, nobody_left: Callable[[], None]) -> None:
        """``nobody_left`` is called where the loop is closed when something comes."""
        self._loop = asyncio.get_running_loop()
        self._nobody_left = nobody_left
        self._pieces: list[str] = []
        self._last: Event | None = None
        self._came = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event; from any thread, and without waiting."""
        try:
            self._loop.call_soon_threadsafe(self._add, event)
        except RuntimeError:  # the loop is closed
            self._nobody_left()

    async def get(self) -> Event:
        """The next event: all the text there is, or how the answer ended."""
        await self._came.wait()
        if self._pieces:
            text = "".join(self._pieces)
            self._pieces.clear()
            if self._last is None:
                self._came.clear()
            return Piece(text)
        assert self._last is not None, "something came"
        return self._last

    def _add(self, event: Event) -> None:
        if isinstance(event, Piece):
            self._pieces.append(event.text)
            if len(self._pieces) > 64:
                self._pieces[:] = ["".join(self._pieces)]
        else:
            self._last = event
        self._came.set()
