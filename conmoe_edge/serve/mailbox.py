"""The events of the answers to one request on their way from the engine's thread to the client's coroutine.

Pieces of an answer that nobody has taken yet become one, so that an answer whose client does not read takes the bytes
of its text and no more (and 8 bytes for each log-probability, where those are wanted). Memory: that text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from conmoe_edge.offload.generation.token_scores import TokenScore
from conmoe_edge.serve.jobs import Event, Piece


class _Line:
    """What came of one answer."""

    __slots__ = ("last", "pieces", "scores", "taken")

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.scores: list[TokenScore] = []
        self.last: Event | None = None
        self.taken = False

    def add(self, event: Event) -> None:
        if not isinstance(event, Piece):
            self.last = event
            return
        self.scores += event.scores
        self.pieces.append(event.text)
        if len(self.pieces) > 64:
            self.pieces[:] = ["".join(self.pieces)]

    def next(self) -> Event | None:
        if self.pieces:
            piece = Piece("".join(self.pieces), tuple(self.scores))
            self.pieces.clear()
            self.scores.clear()
            return piece
        if self.last is None or self.taken:
            return None
        self.taken = True
        return self.last


class Mailbox:
    """Filled from any thread, emptied on the event loop that made it."""

    def __init__(self, nobody_left: Callable[[], None], answers: int = 1) -> None:
        """For so many ``answers``. ``nobody_left`` is called where the loop is closed when something comes."""
        self._loop = asyncio.get_running_loop()
        self._nobody_left = nobody_left
        self._lines = [_Line() for _ in range(answers)]
        self._came = asyncio.Event()

    def into(self, index: int) -> Callable[[Event], None]:
        """What adds an event of an answer; from any thread, and without waiting."""

        def put(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._add, index, event)
            except RuntimeError:  # the loop is closed
                self._nobody_left()

        return put

    @property
    def is_over(self) -> bool:
        """Whether the end of every answer was taken."""
        return all(line.taken for line in self._lines)

    async def get(self) -> tuple[int, Event]:
        """An answer's number and its next event: all the text there is, or how it ended. Not once ``is_over``."""
        while True:
            await self._came.wait()
            for index, line in enumerate(self._lines):
                event = line.next()
                if event is not None:
                    return index, event
            self._came.clear()

    def _add(self, index: int, event: Event) -> None:
        self._lines[index].add(event)
        self._came.set()
