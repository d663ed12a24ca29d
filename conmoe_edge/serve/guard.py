"""The check in front of every request: host, origin, key, size and time.

Pure ASGI. What is refused here never reaches a route. The body is read here, up to its limit and
within its time, so that routes get it whole.

- ``Host`` has to be a name of this server (DNS rebinding), and so has ``Origin`` where a browser sends
  one: pages of other sites cannot start an answer. No CORS header is ever sent.
- Where there is a key, everything but the page and ``/health`` needs ``Authorization: Bearer KEY``.
  Keys are compared in constant time.
- A ``POST`` has to be JSON.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from typing import Any

from conmoe_edge.serve.http_errors import ApiError
from conmoe_edge.serve.settings import Settings, host_is_allowed

Scope = dict[str, Any]
_OPEN_PATHS = frozenset({"/", "/health", "/page/app.js", "/page/style.css", "/page/icon.svg"})
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


class Guard:
    """Wraps the application."""

    def __init__(self, app: Any, settings: Settings, count: Callable[[str, int], None]) -> None:
        """``count`` is told the path and the status of every response."""
        self._app = app
        self._settings = settings
        self._count = count
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def outgoing(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._count(scope["path"], message["status"])
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        try:
            self._admit(scope)
            if scope["method"] == "POST":
                receive = _again(await self._body(scope, receive), receive)
        except ApiError as error:
            await _refuse(error, outgoing)
            return
        except _Gone:
            return
        await self._app(scope, receive, outgoing)

    def _admit(self, scope: Scope) -> None:
        headers = _headers(scope)
        host = headers.get(b"host", b"").decode("latin-1")
        if not host_is_allowed(host, self._settings.allowed_hosts):
            raise ApiError(
                400,
                "This server is not known under that name; --allow-host NAME makes it so.",
                param="Host",
                code="unknown_host",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
            raise ApiError(
                403, "Pages of other sites may not use this server.", code="other_origin"
            )
        if self._key is not None and scope["path"] not in _OPEN_PATHS:
            word, _, given = headers.get(b"authorization", b"").partition(b" ")
            if word.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                raise ApiError(
                    401,
                    "The API key is missing or wrong.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ApiError(415, "The body has to be JSON: Content-Type: application/json.")

    async def _body(self, scope: Scope, receive: Any) -> bytes:
        most = self._settings.limits.body_bytes
        seconds = self._settings.limits.body_seconds
        announced = _headers(scope).get(b"content-length", b"0")
        if announced.isdigit() and int(announced[:20]) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(seconds):
                return await _read(receive, most)
        except TimeoutError:
            raise ApiError(
                408,
                f"The body did not arrive within {seconds:g} s.",
                headers={"Connection": "close"},
            ) from None


class _Gone(Exception):
    """The client left while it was sending."""


async def _read(receive: Any, most: int) -> bytes:
    parts: list[bytes] = []
    total = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        total += len(parts[-1])
        if total > most:
            raise _too_large(most)
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Any) -> Any:
    """A ``receive`` that hands out the body that was read, then goes on as before."""
    given = False

    async def replay() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {most:,} bytes.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope["headers"])


async def _refuse(error: ApiError, send: Any) -> None:
    body = json.dumps(error.body).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    headers += [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
