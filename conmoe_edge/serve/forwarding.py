"""A request on its way to the process of its package, and what that answers on its way back. No torch.

Bytes pass as they are, as fast as the client reads them. A client that leaves closes the connection to the process,
which ends its answer. A process that ends in the middle costs an error in the form of the API that was asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from conmoe_edge.serve.clients import unless_left
from conmoe_edge.serve.guard import CLIENT_HEADER
from conmoe_edge.serve.http_errors import ANTHROPIC_PATH, ApiError, body_for
from conmoe_edge.serve.worker import Worker

_PASSED = (
    "content-type",
    "content-length",
    "retry-after",
    "x-conmoe-changed",
    "x-conmoe-ignored",
    "x-conmoe-model",
)
_CONNECT_SECONDS = 10.0
_LOOK_SECONDS = 5.0


class Forwarding:
    """Connections to all processes."""

    def __init__(self) -> None:
        self._http = httpx.AsyncClient(
            trust_env=False,  # a proxy has no business between two processes of one server
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
        )

    async def forward(
        self, request: Request, body: bytes, worker: Worker, release: Callable[[], None]
    ) -> Response:
        """What the process answers; ``release`` is called once when that is over, however it ends.

        Raises:
            ClientLeft: the client left before there was anything.
            ApiError: the process ended.
        """
        client = "" if request.client is None else request.client.host
        asked = self._http.build_request(
            request.method,
            worker.url + request.url.path,
            content=body,
            headers={
                "content-type": "application/json",
                "authorization": f"Bearer {worker.key}",
                CLIENT_HEADER.decode(): client,
                "accept-encoding": "identity",
            },
        )
        try:
            sent = asyncio.ensure_future(self._http.send(asked, stream=True))
            answer = await unless_left(request, sent)
        except httpx.TransportError as error:
            release()
            raise _ended() from error
        except BaseException:
            release()
            raise
        headers = {name: answer.headers[name] for name in _PASSED if name in answer.headers}
        return _Answer(answer, headers, request.url.path, release)

    async def look(self, worker: Worker, path: str) -> str | None:
        """The text at an address of a process; ``None`` where it does not answer."""
        headers = {"authorization": f"Bearer {worker.key}"}
        try:
            found = await self._http.get(worker.url + path, headers=headers, timeout=_LOOK_SECONDS)
        except httpx.TransportError:
            return None
        return found.text if found.status_code == 200 else None

    async def close(self) -> None:
        """No more connections."""
        await self._http.aclose()


class _Answer(StreamingResponse):
    """What a process answers, until it is over or the client has left."""

    def __init__(
        self,
        answer: httpx.Response,
        headers: Mapping[str, str],
        path: str,
        release: Callable[[], None],
    ) -> None:
        super().__init__(_passed_on(answer, path), answer.status_code, headers)
        self._answer = answer
        self._release = release

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()
            await self._answer.aclose()


async def _passed_on(answer: httpx.Response, path: str) -> AsyncIterator[bytes]:
    try:
        async for some in answer.aiter_raw():
            yield some
    except httpx.TransportError:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise  # the connection breaks off, since the length that was announced does not come
        yield _last_event(path)


def _last_event(path: str) -> bytes:
    """The error that ends a stream."""
    error = _ended()
    if path.startswith(ANTHROPIC_PATH):
        return b"event: error\ndata: " + json.dumps(body_for(error, path)).encode() + b"\n\n"
    value: dict[str, Any] = error.body
    if path == "/v1/responses":
        value = {"type": "error", "code": error.code, "message": error.message, "param": None}
        return b"event: error\ndata: " + json.dumps(value).encode() + b"\n\n"
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _ended() -> ApiError:
    return ApiError(
        500,
        "The process of this model ended. The next request starts it again.",
        code="model_ended",
    )
