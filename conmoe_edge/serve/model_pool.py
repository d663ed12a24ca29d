"""Several packages inside one budget: who is in memory, who waits for it, who has to go. No torch.

A package is loaded when a request asks for it. What it takes beside the others is what it takes with every prototype
resident, or the whole budget where that is less. Where there is no room for that, the package that was used least
recently and answers nobody is unloaded, then the next one. Where only packages that are answering are left, the least
recently used of them takes in no new requests until it is idle, and goes then; its new requests wait behind the load
that is due. So nobody's answer is cut off, and no stream of requests keeps another package out.

One package is loaded at a time, in the order in which they were asked for. A package goes as well when it was idle for
as long as ``keep_alive`` says. What cannot be loaded costs its own requests an error, and is tried again at the next
one, though not within ``RETRY_SECONDS``. Everything happens on one event loop. Bytes are planned ones: those of the
budget that each process was given (``worker_process.py``).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from conmoe_edge.checkpoint.fs.contained import read_inside
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.errors import ConmoeError
from conmoe_edge.plan.least import least_size
from conmoe_edge.serve.busy import Busy
from conmoe_edge.serve.keep_alive import FOREVER, keep_alive_text
from conmoe_edge.serve.worker import Worker, WorkerFailed, ended_by
from conmoe_edge.units import human_size

RETRY_SECONDS = 5.0
ModelState = Literal["unloaded", "loading", "loaded", "unloading", "failed"]


@dataclass(eq=False)
class PooledModel:
    """One package.

    Attributes:
        name, aliases: for clients.
        folder: of the package.
        worker: its process, once it answers.
        answering: requests that use it.
        waiters: requests that wait until it is there.
        leaving: whether it takes in nothing more, because another package needs its room.
        keep: seconds that it stays after its last answer.
        used: ``time.monotonic`` of the last request.
        loads, failures: how often it was loaded, and could not be.
        load_seconds: that the last load took.
        error: of the last load, and ``time.monotonic`` then.
        digest: of the manifest that was loaded last.
        stats: what the worker said when it was ready.
    """

    name: str
    folder: Path
    aliases: tuple[str, ...] = ()
    worker: Worker | None = None
    answering: int = 0
    waiters: list[asyncio.Future[Worker]] = field(default_factory=list)
    leaving: bool = False
    keep: float = 0.0
    used: float = 0.0
    loads: int = 0
    failures: int = 0
    load_seconds: float = 0.0
    error: tuple[ConmoeError, float] | None = None
    digest: str = ""
    stats: dict[str, Any] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    clock: asyncio.TimerHandle | None = None
    going: int = 0

    @property
    def state(self) -> ModelState:
        """For clients."""
        if self.worker is not None:
            return "loaded"
        if self.task is not None:
            return "loading"
        if self.going:
            return "unloading"
        return "unloaded" if self.error is None else "failed"

    @property
    def names(self) -> tuple[str, ...]:
        """All that it is asked for by."""
        return (self.name, *self.aliases)

    def stop_clock(self) -> None:
        """Its time does not run."""
        if self.clock is not None:
            self.clock.cancel()
            self.clock = None


class _Nobody(Exception):
    """Nobody waits for the load any more."""


class ModelPool:
    """The packages of one server."""

    def __init__(
        self,
        models: Sequence[PooledModel],
        start: Callable[[PooledModel], Awaitable[Worker]],
        *,
        total: int,
        start_bytes: int,
        kept_back: int,
        keep_alive: float,
        tell: Callable[[str], None],
        warn: Callable[[str], None],
        last_look: Callable[[PooledModel, Worker], Awaitable[None]],
        gone: Callable[[PooledModel], None],
    ) -> None:
        """Nothing is loaded.

        Args:
            models: all there are.
            start: starts the process of one.
            total: bytes that all of them may take.
            start_bytes: that a process takes before it has loaded anything.
            kept_back: bytes of the budget beside ``total``.
            keep_alive: seconds that a package stays where the request does not say.
            tell: gets one line for people.
            warn: gets one line of what is not as it should be; what all packages have in common once.
            last_look: what is due before a process is ended.
            gone: what is due once it is, whatever ended it.
        """
        self.models = tuple(models)
        self.keep_alive = keep_alive
        self.total = total
        self._start = start
        self._start_bytes = start_bytes
        self._kept_back = kept_back
        self._tell = tell
        self._warn = warn
        self._said_slow = False
        self._last_look = last_look
        self._gone = gone
        self._held: dict[Worker, int] = {}
        self._one_load = asyncio.Lock()
        self._changed = asyncio.Event()
        self._going: set[asyncio.Task[None]] = set()
        self.stopping = False

    @property
    def used(self) -> int:
        """Bytes that processes were given."""
        return sum(self._held.values())

    def granted(self, model: PooledModel) -> int:
        """Bytes that a package was given."""
        return 0 if model.worker is None else self._held.get(model.worker, 0)

    def named(self, name: str) -> PooledModel | None:
        """The package of that name or alias."""
        return next((one for one in self.models if name in one.names), None)

    async def acquire(self, model: PooledModel, keep: float | None) -> Worker:
        """The process of a package, which answers; it stays until ``release``. ``keep``: as of ``PooledModel``, where
        the request says.

        Raises:
            Busy: the server is stopping.
            ConmoeError: the package cannot be loaded.
        """
        if self.stopping:
            raise Busy("stopping", 5)
        model.keep = self.keep_alive if keep is None else keep
        if model.worker is not None and not model.leaving:
            self._take(model)
            return model.worker
        if model.error is not None and time.monotonic() - model.error[1] < RETRY_SECONDS:
            raise model.error[0]
        waiter: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        model.waiters.append(waiter)
        self._begin(model)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(model)  # it came in the moment in which nobody wanted it any more
            raise
        finally:
            if waiter in model.waiters:
                model.waiters.remove(waiter)
            self._changed.set()

    def release(self, model: PooledModel) -> None:
        """A request is over."""
        model.answering -= 1
        model.used = time.monotonic()
        if not model.answering:
            self._wind(model)
        self._changed.set()

    def stop(self) -> None:
        """Take in nothing more; what waits is told."""
        self.stopping = True
        for model in self.models:
            _fail(model, Busy("stopping", 5))
        self._changed.set()

    async def close(self) -> None:
        """End all processes."""
        self.stop()
        for model in self.models:
            if model.task is not None:
                model.task.cancel()
            if model.worker is not None:
                self._unload(model, "")
        loads = [model.task for model in self.models if model.task is not None]
        await asyncio.gather(*loads, return_exceptions=True)
        await asyncio.gather(*self._going, return_exceptions=True)

    def _take(self, model: PooledModel) -> None:
        model.answering += 1
        model.used = time.monotonic()
        model.stop_clock()

    def _begin(self, model: PooledModel) -> None:
        if model.task is None:
            model.task = asyncio.create_task(self._load(model))
            model.task.add_done_callback(lambda _: self._loaded(model))

    def _loaded(self, model: PooledModel) -> None:
        """A load is over; who came in its last moment gets the next one."""
        model.task = None
        self._changed.set()
        if model.waiters and not self.stopping:
            self._begin(model)

    async def _load(self, model: PooledModel) -> None:
        """Have it loaded, and give it to those who wait."""
        try:
            async with self._one_load:
                # One that had to make room may have stayed, since nobody came.
                if model.worker is None:
                    await self._bring(model)
        except _Nobody:
            return
        except ConmoeError as error:
            model.failures += 1
            model.error = error, time.monotonic()
            self._tell(f"{model.name} cannot be loaded: {_line(error)}")
            _fail(model, error)
        except Exception as error:  # a bug; those who wait for it raise it
            model.failures += 1
            _fail(model, error)
        else:
            self._hand_out(model)

    def _hand_out(self, model: PooledModel) -> None:
        worker = model.worker
        if worker is None:
            return  # it ended at once; those who wait get the next one
        waiting, model.waiters = model.waiters, []
        for waiter in waiting:
            if not waiter.done():
                self._take(model)
                waiter.set_result(worker)
        if not model.answering:
            self._wind(model)

    async def _bring(self, model: PooledModel) -> None:
        """From a folder to a process that answers.

        Raises:
            ConmoeError: it cannot be loaded.
        """
        begun = time.monotonic()
        digest = await asyncio.to_thread(_look_at, model.folder)
        if model.digest not in ("", digest):
            self._tell(
                f"{model.name} is another package than the one that was loaded before: "
                f"{model.folder} was replaced."
            )
        await self._make_room(model, self._start_bytes)
        try:
            worker = await self._start(model)
        except OSError as error:
            raise WorkerFailed(
                "There is no process for it.",
                str(error),
                "close other programs, and ask again",
                memory=True,
            ) from error
        self._held[worker] = self._start_bytes
        try:
            least, everything = await worker.needs()
            if least > self.total:
                raise self._too_large(model, least)
            wanted = min(everything, self.total)
            await self._make_room(model, wanted - self._start_bytes)
            self._held[worker] = wanted
            model.stats = await worker.load(
                wanted, self._warn, lambda status: self._ended(model, worker, status)
            )
        except BaseException:
            worker.kill()
            self._end(model, worker, "")
            raise
        model.worker, model.leaving, model.error = worker, False, None
        model.digest = digest
        model.loads += 1
        model.load_seconds = time.monotonic() - begun
        if model.stats["slow"] and not self._said_slow:
            self._warn(model.stats["slow"])
            self._said_slow = True
        self._tell(_loaded_line(model, wanted))

    def _too_large(self, model: PooledModel, least: int) -> WorkerFailed:
        whole = least + self._kept_back
        return WorkerFailed(
            f"{model.name} does not fit into the memory of this server.",
            f"it takes {human_size(least)} at least, and there are {human_size(self.total)} for packages",
            f"--gpu {least_size(whole)}, or a smaller --context",
            memory=True,
            least=whole,
        )

    async def _make_room(self, model: PooledModel, nbytes: int) -> None:
        """Wait until there are ``nbytes`` more for ``model``, and unload others for it.

        Raises:
            _Nobody: meanwhile everybody who waited for it has left.
        """
        try:
            while self.used + nbytes > self.total:
                if not model.waiters:
                    raise _Nobody
                others = sorted(
                    (one for one in self.models if one.worker is not None), key=lambda one: one.used
                )
                idle = next((one for one in others if not one.answering), None)
                if idle is not None:
                    self._unload(idle, f"to make room for {model.name}")
                elif not self._going:
                    if not others:
                        return  # what is left is all there is
                    others[0].leaving = True
                await self._until_change()
        finally:
            for one in self.models:
                one.leaving = False

    async def _until_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _wind(self, model: PooledModel) -> None:
        """Nobody uses it now: the time that it stays begins."""
        model.stop_clock()
        if model.worker is None or model.keep == FOREVER:
            return
        loop = asyncio.get_running_loop()
        model.clock = loop.call_later(model.keep, self._time_is_over, model)

    def _time_is_over(self, model: PooledModel) -> None:
        model.clock = None
        if model.worker is not None and not model.answering:
            self._unload(model, f"unused for {keep_alive_text(model.keep)}")

    def _unload(self, model: PooledModel, why: str) -> None:
        """It takes in nothing more, and its process ends."""
        worker = model.worker
        assert worker is not None, "it is loaded"
        model.worker, model.leaving = None, False
        model.stop_clock()
        self._end(model, worker, why)

    def _end(self, model: PooledModel, worker: Worker, why: str) -> None:
        """End a process beside what goes on; what it held is counted until it is gone."""
        model.going += 1

        async def end() -> None:
            try:
                if worker.url:
                    await self._last_look(model, worker)
                await worker.stop()
            finally:
                self._held.pop(worker, None)
                model.going -= 1
                self._gone(model)
                self._changed.set()
            if why:
                self._tell(f"Unloaded {model.name}, {why}.")

        task = asyncio.create_task(end())
        self._going.add(task)
        task.add_done_callback(self._going.discard)

    def _ended(self, model: PooledModel, worker: Worker, status: int) -> None:
        """A process is over. Where nobody has ended it, that is a crash."""
        if model.worker is not worker:
            return
        model.worker, model.leaving = None, False
        self._held.pop(worker, None)
        self._gone(model)
        model.stop_clock()
        self._tell(
            f"The process of {model.name} ended ({ended_by(status)}); the next request loads it again."
        )
        self._changed.set()


def _fail(model: PooledModel, error: Exception) -> None:
    waiting, model.waiters = model.waiters, []
    for waiter in waiting:
        if not waiter.done():
            waiter.set_exception(error)


def _look_at(folder: Path) -> str:
    """The digest of a package that is whole as far as its headers say: what can be seen without a process.

    Raises:
        PackageError: what is wrong with it.
    """
    open_package(folder)
    return hashlib.sha256(read_inside(folder, "conmoe.json", most_bytes=1 << 30)).hexdigest()


def _loaded_line(model: PooledModel, nbytes: int) -> str:
    resident, prototypes = model.stats["resident"], model.stats["prototypes"]
    share = f", {resident} of {prototypes} prototypes resident" if resident < prototypes else ""
    return f"Loaded {model.name} in {model.load_seconds:.1f} s: {human_size(nbytes)}{share}."


def _line(error: ConmoeError) -> str:
    return f"{error.what} {error.why}".strip()
