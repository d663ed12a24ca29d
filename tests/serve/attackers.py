"""Clients that hurt, and what a server process takes meanwhile. They talk to 127.0.0.1 only, and end by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.patience import PATIENCE
from tests.serve.conftest import NAME, Running


def chat_body(text: str, tokens: int = 2, user: str | None = None) -> bytes:
    asked: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    return json.dumps(asked | ({"user": user} if user else {})).encode()


def head(length: int, path: str = "/v1/chat/completions") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


class Attack:
    """Connections to one server, from a thread and an event loop of their own."""

    def __init__(self, server: Running) -> None:
        address = urlsplit(server.url)
        self._host, self._port = address.hostname, address.port
        self.statuses: list[int] = []

    async def send(
        self, parts: list[bytes], *, stay: float, read: bool = True, every: float = 0.0
    ) -> None:
        """Send ``parts``, one ``every`` so many seconds; then read an answer for ``stay`` seconds, and leave."""
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            return
        try:
            for part in parts:
                writer.write(part)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(writer.drain(), 5)
                if every:
                    await asyncio.sleep(every)
            if read:
                line = await asyncio.wait_for(reader.readline(), stay)
                if line.startswith(b"HTTP/1.1 "):
                    self.statuses.append(int(line.split()[1]))
                    await asyncio.wait_for(reader.read(1 << 16), stay)
            else:
                await asyncio.sleep(stay)
        except (OSError, TimeoutError):
            pass
        finally:
            writer.transport.abort()

    @contextlib.contextmanager
    def running(self, clients: list[dict[str, Any]]) -> Iterator[None]:
        """All of them at once, while the block runs and until they are done."""

        async def everybody() -> None:
            await asyncio.gather(*(self.send(**one) for one in clients))

        thread = threading.Thread(target=lambda: asyncio.run(everybody()))
        thread.start()
        try:
            yield
        finally:
            thread.join(PATIENCE)
            assert not thread.is_alive()


class Watched:
    """Samples of a process's memory and open files."""

    def __init__(self, server: Running) -> None:
        self._folder = Path("/proc") / str(server.process.pid)
        self.most = 0
        self._done = threading.Event()

    @property
    def resident(self) -> int:
        """Bytes now."""
        found = re.search(r"VmRSS:\s+(\d+) kB", (self._folder / "status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    @property
    def peak(self) -> int:
        """The most bytes since the process began."""
        found = re.search(r"VmHWM:\s+(\d+) kB", (self._folder / "status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    @property
    def files(self) -> int:
        return len(list((self._folder / "fd").iterdir()))


class AwakeClock:
    """Seconds in which this process ran. What the machine stood still, or this process and the server with it, does
    not count."""

    TICK = 0.05

    def __init__(self) -> None:
        self.seconds = 0.0
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(self.TICK)
            now = time.monotonic()
            self.seconds += min(now - before, 4 * self.TICK)
            before = now


AWAKE = AwakeClock()


def say_hi(server: Running, user: str | None = "somebody else") -> float:
    """Seconds of ``AWAKE`` until "hi" is answered. A server that asks to come again is asked again."""
    start, end = AWAKE.seconds, time.monotonic() + PATIENCE
    while True:
        response = httpx.post(
            f"{server.url}/v1/chat/completions",
            content=chat_body("hi", 2, user),
            headers={"content-type": "application/json"},
            timeout=PATIENCE,
        )
        if response.status_code == 200:
            return AWAKE.seconds - start
        assert response.status_code in (429, 503), response.text
        assert time.monotonic() < end
        time.sleep(0.1)
