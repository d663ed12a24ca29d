"""A socket, and uvicorn on it: what a server of one package and one of several have in common. No torch."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn

from conmoe_edge.errors import UsageError
from conmoe_edge.serve.connection import timed
from conmoe_edge.serve.settings import Limits

ROUTES = frozenset(
    {
        "/",
        "/detokenize",
        "/health",
        "/metrics",
        "/stats",
        "/tokenize",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/responses",
    }
)


def counted_path(path: str) -> str:
    """Its own name for a route; other paths count together, so that requests cannot make labels without end."""
    return path if path in ROUTES else "other"


class Web(uvicorn.Server):
    """uvicorn with a callback when it begins to stop, and one when all requests are over; a signal is no error."""

    def __init__(
        self,
        app: Any,
        limits: Limits,
        on_stop: Callable[[], None],
        at_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=timed(limits.header_seconds, limits.send_seconds, limits.connections),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=limits.stop_seconds,
                timeout_keep_alive=30,
                h11_max_incomplete_event_size=16 << 10,
            )
        )
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        self._on_stop = on_stop
        self._at_end = at_end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take in nothing more; then as uvicorn does."""
        self._on_stop()
        try:
            await super().shutdown(sockets)
        finally:
            if self._at_end is not None:
                await self._at_end()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """As uvicorn's, without sending the signal once more at the end."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"{host}:{port} cannot be listened on.",
            (reason or str(error)).lower(),
            f"--port {port + 1 if 0 < port < 65535 else 0}, or --host 127.0.0.1",
        ) from error


def url_of(listening: socket.socket) -> str:
    """Where it listens."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
