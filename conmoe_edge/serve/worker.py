"""The process of one package, as the server of several holds it: started, told, heard, stopped. No torch.

The process begins a group of its own, so that Ctrl-C in a terminal reaches the server alone, which lets answers finish.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from conmoe_edge.errors import ConmoeError
from conmoe_edge.serve.worker_order import WorkerOrder

_LINE_BYTES = 1 << 20
STOP_SECONDS = 10.0


class WorkerFailed(ConmoeError):
    """A package could not be loaded. ``memory``: for want of memory; ``least``: bytes of a budget that would do."""

    def __init__(
        self, what: str, why: str, fix: str, *, memory: bool = False, least: int | None = None
    ) -> None:
        super().__init__(what, why, fix)
        self.memory = memory
        self.least = least


class Worker:
    """One process. Everything happens on the event loop that started it."""

    def __init__(self, process: asyncio.subprocess.Process, key: str) -> None:
        self.key = key
        self.url = ""
        self._process = process
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, order: WorkerOrder) -> Worker:
        """Start a process for a package; it gets a key of its own, and waits for its memory.

        Raises:
            OSError: there can be no process.
        """
        key = secrets.token_urlsafe(32)
        order = replace(order, settings=replace(order.settings, api_key=key))
        alone: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            alone = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the folder that the server was started in is no place for modules
            "-m",
            "conmoe_edge.serve.worker_process",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            limit=_LINE_BYTES,
            **alone,
        )
        worker = cls(process, key)
        await worker._say(order.line())
        return worker

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def needs(self) -> tuple[int, int]:
        """Bytes of the budget that the package takes at least, and with every prototype resident.

        Raises:
            WorkerFailed: it cannot be opened.
        """
        value = await self._hear("needs")
        return value["least"], value["everything"]

    async def load(
        self,
        nbytes: int,
        tell: Callable[[str], None],
        on_end: Callable[[int], None],
    ) -> dict[str, Any]:
        """Give it its memory, and wait until it answers; what it says of itself then.

        Args:
            nbytes: of the budget.
            tell: gets its warnings.
            on_end: called once with the exit status when the process is over, whatever ended it.

        Raises:
            WorkerFailed: it cannot be loaded.
        """
        await self._say(json.dumps({"budget": nbytes}))
        found = await self._hear("ready", tell)
        self.url = found["url"]
        self._listening = asyncio.create_task(self._listen(tell, on_end))
        return found

    async def stop(self) -> None:
        """End it, and wait until all that it held is free."""
        await self._say(json.dumps({"stop": True}))
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            self.kill()
            await self._process.wait()
        if self._listening is not None:
            await self._listening

    def kill(self) -> None:
        """End it at once."""
        if self._process.returncode is None:
            self._process.kill()

    async def _listen(self, tell: Callable[[str], None], on_end: Callable[[int], None]) -> None:
        while (value := await self._next()) is not None:
            if "warning" in value:
                tell(value["warning"])
        on_end(await self._process.wait())

    async def _hear(self, word: str, tell: Callable[[str], None] | None = None) -> dict[str, Any]:
        while (value := await self._next()) is not None:
            if word in value:
                return value[word]
            if "failed" in value:
                await self._process.wait()
                raise WorkerFailed(**value["failed"])
            if "warning" in value and tell is not None:
                tell(value["warning"])
        status = await self._process.wait()
        raise WorkerFailed(
            "The process of the package ended while it was loading.",
            ended_by(status),
            "ask again with less beside it; what the process said stands on the server's stderr",
        )

    async def _next(self) -> dict[str, Any] | None:
        """The next line; ``None`` at the end."""
        assert self._process.stdout is not None, "it has a pipe"
        line = await self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    async def _say(self, line: str) -> None:
        assert self._process.stdin is not None, "it has a pipe"
        try:
            self._process.stdin.write(line.encode() + b"\n")
            await self._process.stdin.drain()
        except (OSError, RuntimeError):  # it is over; whoever listens hears of it
            return


def ended_by(status: int) -> str:
    """What the exit status of a process says."""
    if status < 0:
        hint = ", as the system does for want of memory" if status == -9 else ""
        return f"signal {-status} ended it{hint}"
    return f"exit status {status}"
