"""Events that nobody has taken yet."""

from __future__ import annotations

import asyncio

from conmoe_edge.serve.jobs import Done, Piece, Usage
from conmoe_edge.serve.mailbox import Mailbox


def test_pieces_that_nobody_took_are_one_text() -> None:
    async def run() -> None:
        box = Mailbox(lambda: None)
        words = [f"{n} " for n in range(1000)]
        for word in words:
            box.put(Piece(word))
        await asyncio.sleep(0)
        assert len(box._pieces) <= 65
        assert await box.get() == Piece("".join(words))
        done = Done("stop", Usage(1, 2, 0))
        box.put(Piece("x"))
        box.put(done)
        await asyncio.sleep(0)
        assert [await box.get(), await box.get()] == [Piece("x"), done]

    asyncio.run(run())


def test_a_loop_that_is_closed_is_said() -> None:
    gone: list[str] = []

    async def make() -> Mailbox:
        return Mailbox(lambda: gone.append("gone"))

    asyncio.run(make()).put(Piece("x"))
    assert gone == ["gone"]
