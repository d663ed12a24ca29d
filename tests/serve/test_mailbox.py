"""Events that nobody has taken yet."""

from __future__ import annotations

import asyncio
from array import array

from conmoe_edge.offload.generation.token_scores import TokenScore
from conmoe_edge.serve.jobs import Done, Piece, Usage
from conmoe_edge.serve.mailbox import Mailbox
from tests.patience import PATIENCE

SCORE = TokenScore(7, -0.5, array("i", [7]), array("f", [-0.5]))


def test_pieces_that_nobody_took_are_one_text() -> None:
    async def run() -> None:
        box = Mailbox(lambda: None)
        words = [f"{n} " for n in range(1000)]
        for word in words:
            box.into(0)(Piece(word))
        await asyncio.sleep(0)
        assert len(box._lines[0].pieces) <= 65
        assert await box.get() == (0, Piece("".join(words)))
        done = Done("stop", Usage(1, 2, 0))
        box.into(0)(Piece("x"))
        box.into(0)(done)
        await asyncio.sleep(0)
        assert [await box.get(), await box.get()] == [(0, Piece("x")), (0, done)]
        assert box.is_over

    asyncio.run(run())


def test_a_loop_that_is_closed_is_said() -> None:
    gone: list[str] = []

    async def make() -> Mailbox:
        return Mailbox(lambda: gone.append("gone"))

    asyncio.run(make()).into(0)(Piece("x"))
    assert gone == ["gone"]


def test_answers_to_one_request_are_told_apart() -> None:
    async def run() -> None:
        box = Mailbox(lambda: None, 3)
        done = Done("stop", Usage(1, 2, 0))
        for index in (2, 0, 1):
            box.into(index)(Piece(f"text {index}", (SCORE,) * index))
        box.into(1)(Piece("!", (SCORE,)))
        await asyncio.sleep(0)
        assert [await box.get() for _ in range(3)] == [
            (0, Piece("text 0")),
            (1, Piece("text 1!", (SCORE, SCORE))),
            (2, Piece("text 2", (SCORE, SCORE))),
        ]
        for index in range(3):
            assert not box.is_over
            box.into(index)(done)
            assert await asyncio.wait_for(box.get(), PATIENCE) == (index, done)
        assert box.is_over

    asyncio.run(run())
