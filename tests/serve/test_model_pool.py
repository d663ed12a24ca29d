"""Who is in memory, who waits and who goes; with processes that take bytes and no time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from conmoe_edge.errors import ConmoeError
from conmoe_edge.serve import model_pool
from conmoe_edge.serve.busy import Busy
from conmoe_edge.serve.keep_alive import FOREVER
from conmoe_edge.serve.model_pool import ModelPool, PooledModel
from conmoe_edge.serve.worker import WorkerFailed

START = 10


SLOW = "Answers are slow."


class Process:
    """What the pool sees of a package's process."""

    def __init__(self, needs: tuple[int, int], failure: Exception | None) -> None:
        self.needed = needs
        self.failure = failure
        self.given = 0
        self.over = False
        self.url = "here"
        self.on_end: Callable[[int], None] | None = None

    async def needs(self) -> tuple[int, int]:
        await asyncio.sleep(0)
        return self.needed

    async def load(self, nbytes: int, tell: Any, on_end: Callable[[int], None]) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        self.given, self.on_end = nbytes, on_end
        return {"resident": 1, "prototypes": 2, "slow": SLOW}

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self.end(0)

    def kill(self) -> None:
        self.over = True

    def end(self, status: int) -> None:
        """It is over, whoever wanted that."""
        self.over = True
        if self.on_end is not None:
            on_end, self.on_end = self.on_end, None
            on_end(status)


class World:
    """A pool, and all processes that it started."""

    def __init__(self, total: int, keep: float = FOREVER, **needs: tuple[int, int]) -> None:
        self.failures: dict[str, Exception] = {}
        self.needs = needs
        self.started: list[tuple[str, Process]] = []
        self.told: list[str] = []
        self.warned: list[str] = []
        self.most = 0
        models = [PooledModel(name, Path(name)) for name in needs]
        self.pool = ModelPool(
            models,
            self.start,  # type: ignore[arg-type]
            total=total,
            start_bytes=START,
            kept_back=5,
            keep_alive=keep,
            tell=self.told.append,
            warn=self.warned.append,
            last_look=self.last_look,  # type: ignore[arg-type]
            gone=lambda model: None,
        )

    async def start(self, model: PooledModel) -> Process:
        process = Process(self.needs[model.name], self.failures.get(model.name))
        self.started.append((model.name, process))
        return process

    async def last_look(self, model: PooledModel, worker: Process) -> None:
        self.most = max(self.most, self.pool.used)

    def model(self, name: str) -> PooledModel:
        found = self.pool.named(name)
        assert found is not None
        return found

    async def ask(self, name: str, keep: float | None = None) -> Process:
        """The process of a package; ``over`` is due."""
        process: Any = await self.pool.acquire(self.model(name), keep)
        self.most = max(self.most, self.pool.used)
        assert self.pool.used <= self.pool.total
        assert not process.over
        return process

    def over(self, name: str) -> None:
        self.pool.release(self.model(name))

    async def once(self, name: str, keep: float | None = None) -> None:
        await self.ask(name, keep)
        self.over(name)

    @property
    def loaded(self) -> list[str]:
        return [one.name for one in self.pool.models if one.worker is not None]


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Digests of packages by folder; one that is not there is damaged."""
    digests: dict[str, str] = {}

    def look(folder: Path) -> str:
        if digests.get(folder.name) == "":
            raise ConmoeError("It is damaged.", "a file is gone", "make it again")
        return digests.get(folder.name, "1")

    async def at_once(work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr(model_pool, "_look_at", look)
    monkeypatch.setattr(asyncio, "to_thread", at_once)  # what a thread does takes time
    return digests


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(story())


async def settled() -> None:
    """Everything that can happen without time has happened."""
    for _ in range(200):
        await asyncio.sleep(0)


class Clock:
    """That of the running loop, which a test puts forward."""

    def __init__(self) -> None:
        loop: Any = asyncio.get_running_loop()
        own, self._ahead = loop.time, 0.0
        loop.time = lambda: own() + self._ahead

    async def forward(self, seconds: float) -> None:
        self._ahead += seconds
        await settled()


def test_what_fits_stays_and_the_least_recently_used_goes() -> None:
    async def story() -> None:
        world = World(100, a=(20, 40), b=(20, 40), c=(20, 50))
        await world.once("a")
        await world.once("b")
        assert world.loaded == ["a", "b"]
        await world.once("a")
        await world.once("c")
        assert world.loaded == ["a", "c"]
        assert [name for name, _ in world.started] == ["a", "b", "c"]
        await world.once("b")
        assert world.loaded == ["b", "c"]

    run(story)


def test_that_answers_are_slow_here_is_said_once() -> None:
    async def story() -> None:
        world = World(100, a=(20, 40), b=(20, 40))
        for name in "aba":
            await world.once(name, 0.0)
            await settled()
        assert [name for name, _ in world.started] == ["a", "b", "a"]
        assert world.warned == [SLOW]

    run(story)


def test_one_that_is_too_large_to_be_resident_gets_all_there_is() -> None:
    async def story() -> None:
        world = World(100, a=(20, 40), huge=(60, 900))
        await world.once("a")
        process = await world.ask("huge")
        assert (process.given, world.loaded) == (100, ["huge"])

    run(story)


def test_one_that_is_answering_is_not_unloaded_and_the_other_waits() -> None:
    async def story() -> None:
        world = World(100, a=(20, 60), b=(20, 60))
        first = await world.ask("a")
        waiting = asyncio.create_task(world.ask("b"))
        await settled()
        assert not waiting.done() and not first.over
        assert world.model("a").leaving
        late = asyncio.create_task(world.ask("a"))  # it does not keep b out
        await settled()
        assert not late.done()
        world.over("a")
        await waiting
        assert first.over and world.loaded == ["b"]
        world.over("b")
        again = await late
        assert again is not first and world.loaded == ["a"]

    run(story)


def test_a_stream_of_requests_keeps_nobody_out() -> None:
    async def story() -> None:
        world = World(100, a=(20, 60), b=(20, 60))
        done: list[str] = []

        async def client(name: str) -> None:
            for _ in range(10):
                await world.ask(name)
                await asyncio.sleep(0.001)
                world.over(name)
                done.append(name)

        await asyncio.gather(*(client(name) for name in "aaabbb"))
        assert done.count("a") == done.count("b") == 30
        assert "b" in done[: len(done) - 10], "they took turns"
        assert world.most <= 100

    run(story)


def test_all_that_wait_for_one_load_get_it() -> None:
    async def story() -> None:
        world = World(100, a=(20, 60), b=(20, 60))
        found = await asyncio.gather(*(world.ask("a") for _ in range(5)))
        assert len(set(map(id, found))) == len(world.started) == 1
        assert world.model("a").answering == 5

    run(story)


def test_who_leaves_while_it_is_loaded_holds_nothing() -> None:
    async def story() -> None:
        world = World(100, a=(20, 60), b=(20, 60))
        await world.ask("a")
        waiting = [asyncio.create_task(world.ask("b")) for _ in range(3)]
        await settled()
        for one in waiting:
            one.cancel()
        await settled()
        assert world.loaded == ["a"] and not world.model("a").leaving
        assert not world.model("b").waiters and world.model("b").task is None
        await world.once("a")  # takes requests again
        world.over("a")
        assert world.model("a").answering == 0

    run(story)


def test_time_unloads_what_nobody_uses() -> None:
    async def story() -> None:
        clock = Clock()
        world = World(100, keep=3600, a=(20, 30), b=(20, 30))
        await world.once("a")
        await world.ask("b")
        await clock.forward(1800)
        assert world.loaded == ["a", "b"]
        await clock.forward(1801)
        assert world.loaded == ["b"], "it answers still"
        world.over("b")
        await clock.forward(1800)
        assert world.loaded == ["b"]
        await clock.forward(1801)
        assert world.loaded == [] and world.pool.used == 0

    run(story)


@pytest.mark.parametrize(("keep", "stays"), [(0.0, False), (FOREVER, True), (None, True)])
def test_a_request_says_how_long(keep: float | None, stays: bool) -> None:
    async def story() -> None:
        world = World(100, keep=60, a=(20, 30))
        await world.once("a", keep)
        await settled()
        assert bool(world.loaded) == stays
        assert (world.model("a").clock is not None) == (keep is None)

    run(story)


def test_what_cannot_be_loaded_costs_its_own_requests(
    whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_pool, "RETRY_SECONDS", 1e9)

    async def story() -> None:
        world = World(100, a=(20, 40), broken=(20, 40), huge=(900, 900), gone=(20, 40))
        await world.once("a")
        whole["gone"] = ""
        world.failures["broken"] = WorkerFailed("Its weights are damaged.", "", "")
        asked = [world.ask(name) for name in ("broken", "huge", "gone", "broken")]
        found: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
        assert [str(one) for one in found] == [
            "Its weights are damaged.",
            "huge does not fit into the memory of this server. "
            "(it takes 900 B at least, and there are 100 B for packages)",
            "It is damaged. (a file is gone)",
            "Its weights are damaged.",
        ]
        assert found[1].least == 905, "with what the server keeps for itself"
        await settled()
        assert world.loaded == ["a"] and world.pool.used == 40
        assert all(process.over for name, process in world.started if name != "a")
        count = len(world.started)
        with pytest.raises(WorkerFailed):  # not tried again at once
            await world.ask("broken")
        assert len(world.started) == count

    run(story)


def test_a_bug_is_raised_where_it_is_waited_for() -> None:
    async def story() -> None:
        world = World(100, a=(20, 40))
        world.failures["a"] = KeyError("needs")
        with pytest.raises(KeyError):
            await world.ask("a")
        await settled()
        assert len(world.started) == 1 and world.pool.used == 0

    run(story)


def test_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_pool, "RETRY_SECONDS", 0.0)

    async def story() -> None:
        world = World(100, a=(20, 40))
        world.failures["a"] = WorkerFailed("Its weights are damaged.", "", "")
        with pytest.raises(WorkerFailed):
            await world.ask("a")
        await settled()
        assert world.model("a").state == "failed"
        world.failures.clear()
        await world.once("a")
        assert world.model("a").state == "loaded" and world.model("a").failures == 1

    run(story)


def test_a_crash_is_told_and_the_next_request_loads_again() -> None:
    async def story() -> None:
        world = World(100, a=(20, 40), b=(20, 40))
        await world.once("b")
        process = await world.ask("a")
        process.end(-11)
        assert world.loaded == ["b"] and world.pool.used == 40
        assert any("signal 11" in line for line in world.told)
        world.over("a")
        assert await world.ask("a") is not process
        assert world.model("a").answering == 1

    run(story)


def test_a_package_that_was_replaced_goes_on_and_is_said(whole: dict[str, str]) -> None:
    async def story() -> None:
        world = World(100, a=(20, 60), b=(20, 60))
        process = await world.ask("a")
        whole["a"] = "2"
        assert await world.ask("a") is process
        world.over("a")
        world.over("a")
        await world.once("b")
        assert not any("replaced" in line for line in world.told)
        await world.once("a")
        assert any("replaced" in line for line in world.told)

    run(story)


def test_stopping_tells_who_waits_and_ends_everything() -> None:
    async def story() -> None:
        world = World(100, a=(20, 60), b=(20, 60))
        await world.ask("a")
        waiting = asyncio.create_task(world.ask("b"))
        await settled()
        world.pool.stop()
        with pytest.raises(Busy):
            await waiting
        with pytest.raises(Busy):
            await world.ask("a")
        await world.pool.close()
        assert world.pool.used == 0 and all(process.over for _, process in world.started)

    run(story)
