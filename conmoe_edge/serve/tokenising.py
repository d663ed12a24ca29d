"""Texts to tokens, one after the other on one thread, fair between clients.

A long text takes a while, and the event loop has others to serve. One text at a time, so that only one has the
tokenizer's tables in memory (``plan/needs.py`` counts them). A text whose client has left is dropped before its turn.
"""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import Callable
from typing import TypeAlias

from conmoe_edge.memory.heap import trim_heap
from conmoe_edge.serve.waiting import FairQueue

Tokens: TypeAlias = "array[int]"
"""Of four bytes each, where a list takes forty."""

LARGE_TEXT = 32 << 10
"""Bytes of a text from which on what the tokenizer leaves in the heap is given back at once."""


class _Work:
    """One text that waits."""

    __slots__ = ("future", "large", "loop", "make")

    def __init__(self, make: Callable[[], Tokens], large: bool) -> None:
        self.make = make
        self.large = large
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Tokens] = self.loop.create_future()


class Tokenising:
    """The thread and its queue."""

    def __init__(self, longest: int) -> None:
        """``longest`` texts wait at most; the callers see to it that there are no more."""
        self._wake = threading.Condition()
        self._waiting: FairQueue[_Work] = FairQueue(longest)
        self._stopped = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        with self._wake:
            return len(self._waiting)

    async def tokens(self, client: str, make: Callable[[], Tokens], nbytes: int) -> Tokens:
        """What ``make`` gives, made on the thread when the client's turn comes. Where the caller is cancelled
        before that, it is not called at all.

        Raises:
            Whatever ``make`` raises.
        """
        work = _Work(make, nbytes >= LARGE_TEXT)
        with self._wake:
            self._waiting.add(client, work)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="conmoe-tokenising", daemon=True
                )
                self._thread.start()
            self._wake.notify()
        try:
            return await work.future
        finally:
            with self._wake:
                self._waiting.remove(work)

    def stop(self) -> None:
        """End the thread after the text it is at."""
        with self._wake:
            self._stopped = True
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not len(self._waiting) and not self._stopped:
                    self._wake.wait()
                if self._stopped:
                    return
                work = self._waiting.pop()
            self._make(work)
            del work  # it would keep the text until the next one comes

    @staticmethod
    def _make(work: _Work) -> None:
        found: Tokens | None = None
        failed: BaseException | None = None
        try:
            found = work.make()
        except BaseException as error:  # handed to the coroutine that waits for it
            failed = error
        if work.large:
            trim_heap()

        def tell() -> None:
            if work.future.done():
                return
            if failed is not None:
                work.future.set_exception(failed)
            else:
                assert found is not None, "it did not fail"
                work.future.set_result(found)

        try:
            work.loop.call_soon_threadsafe(tell)
        except RuntimeError:  # the loop is closed, so nobody waits
            return
