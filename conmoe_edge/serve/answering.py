"""From the engine's events to the client: the answers to one request, whole or as a stream.

A client that leaves ends its answers, wherever they stand.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from conmoe_edge.offload.generation.answer_parts import PartReader
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.serve.clients import unless_left
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.guard import entry_of
from conmoe_edge.serve.http_errors import as_api_error
from conmoe_edge.serve.jobs import Done, Job, Piece
from conmoe_edge.serve.mailbox import Mailbox
from conmoe_edge.serve.replies import STILL_HERE, Reply, Whole
from conmoe_edge.serve.tokenising import Tokens

SIGN_OF_LIFE_SECONDS = 15.0


@dataclass(frozen=True)
class Asked:
    """What the engine is to answer.

    Attributes:
        prompts: tokens of each answer's prompt.
        settings: how each answer is drawn.
        client: whose line they wait in.
        reader: makes what takes an answer's text apart.
        stream: whether the client wants them as they come.
        headers: of the response.
    """

    prompts: Sequence[Tokens]
    settings: Sequence[SamplingSettings]
    client: str
    reader: Callable[[], PartReader]
    stream: bool
    headers: Mapping[str, str]


async def answer(engine: Engine, asked: Asked, reply: Reply, request: Request) -> Response:
    """All answers, as ``reply`` tells them.

    Raises:
        Busy: they were not taken in.
        ClientLeft: the client left before they were there.
    """
    jobs: list[Job] = []
    events = Mailbox(lambda: _cancel(engine, jobs), len(asked.prompts))
    try:
        for index, (tokens, settings) in enumerate(zip(asked.prompts, asked.settings, strict=True)):
            jobs.append(Job(tokens, settings, asked.client, events.into(index)))
            engine.submit(jobs[-1])
    except BaseException:
        _cancel(engine, jobs)
        raise
    entry_of(request.scope).on_withdraw(lambda: engine.withdraw(*jobs))
    readers = [asked.reader() for _ in jobs]
    if asked.stream:
        content = _stream(events, reply, readers)
        return AnswerStream(lambda: _cancel(engine, jobs), content, asked.headers)
    try:
        whole = asyncio.ensure_future(_collect(events, reply, readers))
        value = await unless_left(request, whole)
    finally:
        _cancel(engine, jobs)  # nothing happens where they are over
    return JSONResponse(value, headers=dict(asked.headers))


class AnswerStream(StreamingResponse):
    """A stream whose end, whatever it is, is the end of its jobs: a client may be gone before the first
    byte was wanted.
    """

    def __init__(
        self,
        cancel: Callable[[], None],
        content: AsyncIterator[bytes],
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(content, media_type="text/event-stream", headers=dict(headers))
        self._cancel = cancel

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()


def _cancel(engine: Engine, jobs: Sequence[Job]) -> None:
    for job in jobs:
        engine.cancel(job)


async def _stream(
    events: Mailbox, reply: Reply, readers: Sequence[PartReader]
) -> AsyncIterator[bytes]:
    """Server-sent events until all answers are over."""
    yield reply.start()
    while not events.is_over:
        try:
            index, one = await asyncio.wait_for(events.get(), SIGN_OF_LIFE_SECONDS)
        except TimeoutError:
            yield STILL_HERE
            continue
        if isinstance(one, Piece):
            parts = readers[index].add(one.text)
            if parts or one.scores:
                yield reply.more(index, parts, one.scores)
        elif isinstance(one, Done):
            rest = readers[index].finish()
            last = reply.more(index, rest, ()) if rest else b""
            yield last + reply.end(index, one)
        else:
            yield reply.failed(as_api_error(one.error))
            return
    yield reply.close()


async def _collect(events: Mailbox, reply: Reply, readers: Sequence[PartReader]) -> dict[str, Any]:
    parts: list[list[Any]] = [[] for _ in readers]
    scores: list[list[Any]] = [[] for _ in readers]
    over: dict[int, Done] = {}
    while not events.is_over:
        index, one = await events.get()
        if isinstance(one, Piece):
            parts[index] += readers[index].add(one.text)
            scores[index] += one.scores
        elif isinstance(one, Done):
            parts[index] += readers[index].finish()
            over[index] = one
        else:
            raise as_api_error(one.error)
    numbers = range(len(readers))
    return reply.whole([Whole(parts[n], scores[n], over[n]) for n in numbers])
