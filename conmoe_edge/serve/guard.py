"""The check in front of every request: host, origin, key, size and time.

Pure ASGI. What is refused here never reaches a route. The body is read here, up to its limit, within its time and
counted (``intake.py``), so that routes get it whole: as ``body_of(scope)``, once.

- ``Host`` has to be a name of this server (DNS rebinding), and so has ``Origin`` where a browser sends
  one: pages of other sites cannot start an answer. CORS headers are sent to the origins that were allowed, and to
  no other.
- Where there is a key, everything but the page and ``/health`` needs ``Authorization: Bearer KEY``, or ``x-api-key``.
  Keys are compared in constant time.
- A ``POST`` has to be JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import Callable
from typing import Any

from conmoe_edge.serve.busy import Busy
from conmoe_edge.serve.http_errors import ApiError, as_api_error, body_for
from conmoe_edge.serve.intake import Entry, Intake
from conmoe_edge.serve.page_files import PAGE_PATHS
from conmoe_edge.serve.settings import Settings, host_is_allowed

Scope = dict[str, Any]
_OPEN_PATHS = PAGE_PATHS | {"/health"}
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

    def __init__(
        self,
        app: Any,
        settings: Settings,
        count: Callable[[str, int], None],
        intake: Intake,
        largest: Callable[[], int],
    ) -> None:
        """``count`` is told the path and the status of every response; ``largest`` says how many bytes a body may
        have, and raises ``Busy`` while nothing is answered."""
        self._app = app
        self._settings = settings
        self._count = count
        self._intake = intake
        self._largest = largest
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def outgoing(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._count(scope["path"], message["status"])
                headers = [*message.get("headers", []), *_HEADERS, *self._cross_origin(scope)]
                message = {**message, "headers": headers}
            await send(message)

        entry: Entry | None = None
        try:
            self._admit(scope)
            if _asks_first(scope) and self._origin_is_allowed(scope):
                await outgoing({"type": "http.response.start", "status": 204, "headers": []})
                await outgoing({"type": "http.response.body", "body": b""})
                return
            self._check_key(scope)
            if self._settings.forwarded:
                _name_client(scope)
            if scope["method"] == "POST":
                self._check_kind(scope)
                entry = await self._taken_in(scope, receive)
        except ApiError as error:
            await _refuse(error, body_for(error, scope["path"]), receive, outgoing)
            return
        except _Gone:
            return
        try:
            await self._app(scope, receive, outgoing)
        finally:
            if entry is not None:
                entry.close()

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
        own = origin is None or origin.partition(b"://")[2] == headers.get(b"host")
        if not own and not self._origin_is_allowed(scope):
            raise ApiError(
                403, "Pages of other sites may not use this server.", code="other_origin"
            )

    @staticmethod
    def _check_kind(scope: Scope) -> None:
        kind = _headers(scope).get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "The body has to be JSON: Content-Type: application/json.")

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in _OPEN_PATHS:
            return
        headers = _headers(scope)
        word, _, given = headers.get(b"authorization", b"").partition(b" ")
        shown = given.strip() if word.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not hmac.compare_digest(shown, self._key):
            raise ApiError(
                401,
                "The API key is missing or wrong.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _origin_is_allowed(self, scope: Scope) -> bool:
        origin = _headers(scope).get(b"origin")
        allowed = self._settings.allowed_origins
        return origin is not None and ("*" in allowed or origin.decode("latin-1") in allowed)

    def _cross_origin(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What lets a page of an allowed site read the response."""
        if not self._origin_is_allowed(scope):
            return []
        headers = _headers(scope)
        wanted = headers.get(b"access-control-request-headers", b"authorization, content-type")
        return [
            (b"access-control-allow-origin", headers[b"origin"]),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", wanted),
            (b"access-control-expose-headers", b"x-conmoe-ignored, x-conmoe-model"),
            (b"access-control-max-age", b"600"),
            (b"vary", b"origin"),
        ]

    async def _taken_in(self, scope: Scope, receive: Any) -> Entry:
        """Read the body, and leave it and its entry in ``scope``. A body that is pushed out gets 429."""
        seconds = self._settings.limits.body_seconds
        pushed_out = False
        entry: Entry | None = None
        try:
            most = self._largest()
            announced = _announced(scope)
            if announced > most:
                raise _too_large(most)
            if self._intake.full and announced > _SMALL_BODY:
                raise self._intake.busy()
            async with asyncio.timeout(seconds) as clock:

                def break_off() -> bool:
                    nonlocal pushed_out
                    pushed_out = True
                    clock.reschedule(asyncio.get_running_loop().time())
                    return True

                entry = self._intake.begin(break_off)
                scope[_BODY] = await _read(receive, most, entry)
                entry.on_withdraw(lambda: False)
        except BaseException as error:
            if entry is not None:
                entry.close()
            if isinstance(error, Busy) or (isinstance(error, TimeoutError) and pushed_out):
                busy = error if isinstance(error, Busy) else self._intake.busy()
                refused = as_api_error(busy)
                refused.headers["Connection"] = "close"
                raise refused from None
            if isinstance(error, TimeoutError):
                raise ApiError(
                    408,
                    f"The body did not arrive within {seconds:g} s.",
                    headers={"Connection": "close"},
                ) from None
            raise
        scope[_ENTRY] = entry
        return entry


def _name_client(scope: Scope) -> None:
    """A server of several packages, which has shown the key, says for whom it asks."""
    named = _headers(scope).get(CLIENT_HEADER)
    if named is not None:
        scope["client"] = (named.decode("latin-1"), 0)


CLIENT_HEADER = b"x-conmoe-client"


def entry_of(scope: Any) -> Entry:
    """The account of a request whose body was read here."""
    return scope[_ENTRY]


def body_of(scope: Any) -> bytes:
    """Its body, which nobody else holds."""
    return scope.pop(_BODY)


def _asks_first(scope: Scope) -> bool:
    """Whether a browser asks if it may ask; it shows no key then."""
    return scope["method"] == "OPTIONS" and b"access-control-request-method" in _headers(scope)


_ENTRY, _BODY = "conmoe.entry", "conmoe.body"
_SMALL_BODY = 16 << 10
"""Of a request that comes while all places are taken, a larger one is not even read."""


class _Gone(Exception):
    """The client left while it was sending."""


async def _read(receive: Any, most: int, entry: Entry) -> bytes:
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
        entry.hold(total + _PART_BYTES * len(parts))
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


_PART_BYTES = 64  # Python's own share of a piece of a body, however small


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {most:,} bytes.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _announced(scope: Scope) -> int:
    """Bytes of the body by its head; 0 where that does not say."""
    length = _headers(scope).get(b"content-length", b"0")
    return int(length[:20]) if length.isdigit() else 0


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope["headers"])


async def _refuse(error: ApiError, value: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer ``error`` by ``value``; what the client still sends meanwhile is thrown away for a moment.

    A connection that is closed over unread bytes is reset, and the client may lose the answer (RFC 9112, section 9.6).
    """
    body = json.dumps(value).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    headers += [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            message = await receive()
            while message["type"] != "http.disconnect" and message.get("more_body"):
                message = await receive()
    await send({"type": "http.response.body", "body": b""})


_LINGER_SECONDS = 2.0  # a client that sends on for longer without looking at the answer is cut off
