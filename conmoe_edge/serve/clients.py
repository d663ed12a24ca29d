"""Who a client is, and waiting for something only as long as it is there. No torch."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import Request

from conmoe_edge.serve.busy import Busy

T = TypeVar("T")


class ClientLeft(Exception):
    """The client left before there was anything to tell it."""


async def unless_left(request: Request, making: asyncio.Future[T]) -> T:
    """What ``making`` comes to.

    Raises:
        ClientLeft: the client left before that; ``making`` is cancelled.
        Busy: somebody else cancelled it, because there was no room.
    """
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if making.cancelled():
            raise Busy("full")
        if making.done():
            return making.result()
        raise ClientLeft
    finally:
        making.cancel()
        leaving.cancel()


def client_of(request: Request, user: str | None) -> str:
    """Whose line a request joins: the user it names, else the address it comes from."""
    where = request.client.host if request.client is not None else ""
    return f"user:{user}" if user else f"address:{where}"


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
