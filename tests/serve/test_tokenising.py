"""Texts wait for their tokens in turn, and those whose client has left are not looked at."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import Callable

import pytest

from conmoe_edge.serve.tokenising import Tokenising
from tests.patience import PATIENCE


def test_turns_go_round_and_who_left_is_dropped() -> None:
    made: list[str] = []
    begun, go = threading.Event(), threading.Event()

    def work(name: str) -> Callable[[], array[int]]:
        def make() -> array[int]:
            made.append(name)
            if name == "first":
                begun.set()
                assert go.wait(PATIENCE)
            return array("i", [len(name)])

        return make

    async def run() -> None:
        pool = Tokenising(8)
        names = ("first", "a1", "a2", "left", "b1")
        tasks = {name: asyncio.create_task(pool.tokens(name[0], work(name), 1)) for name in names}
        await asyncio.to_thread(begun.wait, PATIENCE)
        assert len(pool) == 4
        tasks["left"].cancel()
        await asyncio.sleep(0.01)
        assert len(pool) == 3
        go.set()
        assert (await tasks["b1"]).tolist() == [2]
        await asyncio.gather(tasks["first"], tasks["a1"], tasks["a2"])
        assert len(pool) == 0
        pool.stop()

    asyncio.run(run())
    assert made == ["first", "a1", "b1", "a2"]


def test_what_a_text_raises_reaches_its_client_alone() -> None:
    def fail() -> array[int]:
        raise ValueError("not this text")

    async def run() -> None:
        pool = Tokenising(2)
        with pytest.raises(ValueError, match="not this text"):
            await pool.tokens("a", fail, 1)
        assert (await pool.tokens("a", lambda: array("i", [7]), 1 << 20)).tolist() == [7]
        pool.stop()

    asyncio.run(run())
