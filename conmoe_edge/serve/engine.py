"""The thread that owns the model: who is answered, in what order, in which memory.

All forwards happen here, one at a time. Answers that run take turns; a turn is one chunk of a prompt or
a few tokens. Each has a key-value cache of its own inside the memory that was planned for one
conversation (``Room``), and its forwards are those of a conversation alone, so its tokens are the same as
alone. Who finds no room waits in a bounded queue (``FairQueue``).

An answer that nobody wants any more ends before its next turn and gives back what it held. The cache of
an answer that is over is cut to its prompt's whole chunks and kept while nobody else needs the room.

Memory: what was planned. ``submit`` raises ``Busy``; the engine's own end is told by ``on_end``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from conmoe_edge.offload.fastpath.kv_cache import STEP_TOKENS
from conmoe_edge.offload.generation.context_limit import longest_context
from conmoe_edge.offload.generation.prompt import end_tokens
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.runtime import Runtime
from conmoe_edge.serve.answer import Answer, Ask, Finish, Usage, reusable
from conmoe_edge.serve.metrics import Metrics, Outcome, Snapshot, State
from conmoe_edge.serve.room import Room
from conmoe_edge.serve.waiting import FairQueue

TURN_TOKENS = 4
"""Tokens of a turn where prototypes have to be read: neighbouring tokens of one answer ask for much the
same prototypes, those of two answers do not. With everything resident a turn is one token.
"""
SPEED_WINDOW = 5.0
PUBLISH_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is over."""

    finish: Finish
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer could not be made."""

    error: BaseException


Event = Piece | Done | Failed


class Busy(Exception):
    """No more can be taken in: the queue is full, or the engine is not (or no longer) there."""

    def __init__(
        self, reason: Literal["full", "loading", "stopping"], retry_after: int = 1
    ) -> None:
        self.reason = reason
        self.retry_after = retry_after
        super().__init__(reason)


@dataclass(eq=False, slots=True)
class Job:
    """One request. ``tell`` is called from the engine's thread and must not block."""

    ask: Ask
    client: str
    tell: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    started: float = 0.0
    reserved: int = 0
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the engine computes with."""

    model: Any
    tokenizer: Any


@dataclass(slots=True)
class _Kept:
    """The cache of a prompt whose answer is over."""

    cached: CachedTokens
    reserved: int


class Engine:
    """Takes requests from any thread, answers them on its own."""

    def __init__(
        self,
        load: Callable[[], Loaded],
        *,
        parallel: int,
        queue: int,
        metrics: Metrics,
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        """Nothing runs before ``start``.

        Args:
            load: opens the package; called on the engine's thread.
            parallel: most answers that are made at once.
            queue: most requests that wait.
            metrics: told of every answer.
            on_end: called on the engine's thread when it is over, with the error that ended it.
        """
        self.loaded: Loaded | None = None
        self._load = load
        self._parallel = parallel
        self._metrics = metrics
        self._on_end = on_end
        self._wake = threading.Condition()
        self._most = queue + parallel
        self._waiting: FairQueue[Job] = FairQueue(self._most)
        self._running: deque[Job] = deque()
        self._kept: list[_Kept] = []  # the least recently used first
        self._state: State = "loading"
        self._made: deque[tuple[float, int]] = deque()
        self._seconds_per_answer = 1.0
        self._published = 0.0
        self._held = Snapshot()
        self._in_turn = 0
        self._thread = threading.Thread(target=self._run, name="conmoe-engine", daemon=True)

    def start(self) -> None:
        """Begin to load, then to answer."""
        self._thread.start()

    @property
    def context(self) -> int:
        """Most tokens of one conversation."""
        assert self.loaded is not None, "asked once it is ready"
        runtime: Runtime = self.loaded.model.conmoe
        longest = longest_context(self.loaded.model)
        return runtime.context if longest is None else min(runtime.context, longest)

    def submit(self, job: Job) -> None:
        """Line up.

        Raises:
            Busy: it was not taken in.
        """
        with self._wake:
            if self._state != "ready":
                raise Busy("loading" if self._state == "loading" else "stopping", 5)
            if len(self._waiting) + len(self._running) + self._in_turn >= self._most:
                raise Busy("full", self._wait_estimate())
            self._waiting.add(job.client, job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants this answer any more. Does nothing where it is over."""
        with self._wake:
            job.cancelled = True
            if self._waiting.remove(job):
                self._metrics.answer("cancelled", 0, 0, 0)
            self._wake.notify()

    def stop(self) -> None:
        """Take in nothing more; end when what runs is over or cancelled."""
        with self._wake:
            if self._state in ("ready", "loading"):
                self._state = "stopping"
            for job in self._waiting.drain():
                job.tell(Failed(Busy("stopping")))
                self._metrics.answer("cancelled", 0, 0, 0)
            self._wake.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end; whether it came."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._open()
            while self._next_round():
                for _ in range(len(self._running)):
                    job = self._running.popleft()
                    self._in_turn = 1
                    goes_on = self._turn(job)
                    self._in_turn = 0
                    if goes_on:
                        self._running.append(job)
                    self._publish()
        except BaseException as caught:
            error = caught
        finally:
            with self._wake:
                self._state = "failed" if error is not None else "stopping"
                left = [*self._running, *self._waiting.drain()]
                self._running.clear()
            for job in left:
                job.tell(Failed(error or Busy("stopping")))
            self._kept.clear()
            if self.loaded is not None:
                self.loaded.model.conmoe.close()
            self._publish(force=True)
            self._on_end(error)

    def _open(self) -> None:
        loaded = self._load()
        self._runtime: Runtime = loaded.model.conmoe
        self._ends = end_tokens(loaded.model, loaded.tokenizer)
        self._room = Room(self._runtime.context, STEP_TOKENS, self._runtime.cache_bytes)
        self._chunk = max(1, min(self._runtime.prefill_chunk, self._runtime.context))
        with self._wake:
            self.loaded = loaded
            if self._state == "loading":
                self._state = "ready"
            self._publish(force=True)

    def _next_round(self) -> bool:
        """Let in who has room; sleep where there is nothing to do. False at the end."""
        with self._wake:
            while True:
                while (job := self._waiting.first()) is not None and self._may_start(job):
                    self._waiting.pop()
                    self._running.append(job)
                if self._running:
                    return True
                if self._state != "ready":
                    return False
                self._publish(force=True)
                self._wake.wait()

    def _may_start(self, job: Job) -> bool:
        """Reserve room for the next in line, with what an earlier prompt left where that is a
        beginning of this one. False where it has to wait.
        """
        if len(self._running) >= self._parallel:
            return False
        wanted = self._room.tokens(len(job.ask.tokens) + job.ask.max_tokens)
        nbytes = self._room.nbytes(wanted)
        best = max(self._kept, key=lambda one: self._shared(one.cached, job), default=None)
        if best is not None and self._shared(best.cached, job):
            self._drop(best)
            nbytes = max(nbytes, best.reserved)  # its buffers are that long
        else:
            best = None
        while not self._room.fits(nbytes) and self._kept:
            self._drop(self._kept[0])
        if not self._room.fits(nbytes):
            if best is not None:  # it was there before, so it fits
                self._room.take(best.reserved)
                self._kept.append(best)
            return False
        self._room.take(nbytes)
        self._runtime.make_room(self._room.worth())
        job.reserved = nbytes
        job.started = time.monotonic()
        assert self.loaded is not None, "the engine runs"
        cached = best.cached if best is not None else self._new_cache()
        cached.keep(self._shared(cached, job))
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        job.answer = Answer(job.ask, cached, model, tokenizer, self._ends)
        return True

    def _new_cache(self) -> CachedTokens:
        assert self.loaded is not None, "the engine runs"
        return CachedTokens(self.loaded.model, self._chunk, self._retreat)

    def _shared(self, cached: CachedTokens, job: Job) -> int:
        return reusable(cached.held, job.ask.tokens, self._chunk)

    def _drop(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        self._room.give_back(kept.reserved)

    def _retreat(self) -> bool:
        """Memory ran out: give up kept prompts first, then slots."""
        if self._kept:
            for kept in list(self._kept):
                self._drop(kept)
            return True
        return self._runtime.retreat()

    def _turn(self, job: Job) -> bool:
        """A chunk of the prompt or a few tokens of the answer; whether it goes on."""
        answer = job.answer
        assert answer is not None, "it was started"
        tokens = 1 if self._runtime.residency.all_resident else TURN_TOKENS
        before = answer.made
        try:
            for _ in range(tokens):
                if job.cancelled:
                    self._over(job, "cancelled")
                    return False
                first = answer.first_token_at is None
                piece = answer.step()
                if first and answer.first_token_at is not None:
                    self._metrics.first_token(answer.first_token_at - job.arrived)
                if piece:
                    job.tell(Piece(piece))
                if answer.finish is not None:
                    self._over(job, answer.finish)
                    job.tell(Done(answer.finish, answer.usage))
                    return False
                if first:
                    break
        except Exception as error:
            answer.cached.forget()
            self._over(job, "failed")
            job.tell(Failed(error))
            return False
        finally:
            self._count(answer.made - before)
        return True

    def _over(self, job: Job, outcome: Outcome) -> None:
        """Give back the room, or keep the prompt for who asks next."""
        answer = job.answer
        assert answer is not None, "it was started"
        usage = answer.usage
        self._metrics.answer(outcome, usage.prompt, usage.cached, usage.completion)
        spent = time.monotonic() - job.started
        self._seconds_per_answer += 0.2 * (spent - self._seconds_per_answer)
        answer.cached.keep(answer.whole_chunks(self._chunk))
        whole = answer.cached.chunk == self._chunk and answer.cached.in_chunks
        if answer.cached.held and whole:
            self._kept.append(_Kept(answer.cached, job.reserved))
        else:
            answer.cached.forget()
            self._room.give_back(job.reserved)
        self._publish(force=True)

    def _count(self, tokens: int) -> None:
        now = time.monotonic()
        if tokens:
            self._made.append((now, tokens))
        while self._made and now - self._made[0][0] > SPEED_WINDOW:
            self._made.popleft()

    def _speed(self) -> float:
        now = time.monotonic()
        recent = [(at, tokens) for at, tokens in list(self._made) if now - at <= SPEED_WINDOW]
        if len(recent) < 2:
            return 0.0
        span = max(now - recent[0][0], 1e-3)
        return sum(tokens for _, tokens in recent[1:]) / span

    def _wait_estimate(self) -> int:
        ahead = len(self._waiting) / self._parallel
        return max(1, min(600, round(self._seconds_per_answer * ahead)))

    @property
    def snapshot(self) -> Snapshot:
        """What is held now; from any thread."""
        return replace(
            self._held,
            state=self._state,
            queued=len(self._waiting),
            running=len(self._running) + self._in_turn,
            kept=len(self._kept),
            tokens_per_second=self._speed(),
        )

    def _publish(self, force: bool = False) -> None:
        """Note the runtime's figures for readers on other threads, now and then. On the engine's thread."""
        now = time.monotonic()
        if self.loaded is None or (not force and now - self._published < PUBLISH_SECONDS):
            return
        self._published = now
        self._held = Snapshot(
            cache_bytes=self._room.used,
            cache_total_bytes=self._room.total,
            runtime=self._runtime.stats(),
        )
