"""The thread that owns the model: which answers run, in what order, in which memory.

All forwards happen here, one at a time. In a round all answers that are past their prompts make a token, in a step that
they share (``shared_steps.py``), and one prompt gets on by a chunk: prompts take turns for that, so nobody waits for
more than a chunk of each. Where a model does not share steps all answers take turns; a turn is one chunk of a prompt or
a few tokens. Each has a key-value cache of its own inside the memory that was planned for one conversation (``Room``),
and its sums are those of a conversation alone, so its tokens are the same as alone. What finds no room waits in a
bounded queue (``FairQueue``).

A cancelled answer ends before its next turn and gives back what it held. The prompt of an answer that is over is kept
for a next one that begins the same, while answers do not need the room (``KeptPrompts``).

Memory: what was planned.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from conmoe_edge.memory.heap import trim_heap
from conmoe_edge.offload.fastpath.kv_cache import STEP_TOKENS
from conmoe_edge.offload.generation.answer import Answer
from conmoe_edge.offload.generation.cache_room import Room
from conmoe_edge.offload.generation.context_limit import longest_context
from conmoe_edge.offload.generation.prefix_chunks import form_of_model
from conmoe_edge.offload.generation.prompt import end_tokens
from conmoe_edge.offload.generation.sequence import CachedTokens, is_out_of_memory
from conmoe_edge.offload.generation.shared_steps import (
    MOST_TOGETHER,
    is_next_single,
    may_share,
    shared_scores,
)
from conmoe_edge.offload.runtime import Runtime
from conmoe_edge.plan.requests import RequestSizes, request_sizes
from conmoe_edge.serve.busy import Busy
from conmoe_edge.serve.jobs import Done, Failed, Job, Loaded, Piece, Usage
from conmoe_edge.serve.kept_prompts import KeptPrompts
from conmoe_edge.serve.prometheus import KeptFigures, Metrics, Outcome, Snapshot, State
from conmoe_edge.serve.waiting import FairQueue

TURN_TOKENS = 4
"""Tokens of a turn where prototypes have to be read: neighbouring tokens of one answer ask for much the
same prototypes, those of two answers do not. With everything resident a turn is one token.
"""
SPEED_WINDOW = 5.0
PUBLISH_SECONDS = 0.25
TRIM_SECONDS = 5.0


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
        on_ready: Callable[[Loaded], None] | None = None,
    ) -> None:
        """Nothing runs before ``start``.

        Args:
            load: opens the package; called on the engine's thread.
            parallel: most answers that are made at once.
            queue: most requests that wait.
            metrics: told of every answer.
            on_end: called on the engine's thread when it is over, with the error that ended it.
            on_ready: called there once requests are taken in, with what was loaded.
        """
        self.loaded: Loaded | None = None
        self._load = load
        self._parallel = parallel
        self._metrics = metrics
        self._on_end = on_end
        self._on_ready = on_ready
        self._wake = threading.Condition()
        self._most = queue + parallel
        self._waiting: FairQueue[Job] = FairQueue(self._most)
        self._running: deque[Job] = deque()
        self._state: State = "loading"
        self._made: deque[tuple[float, int]] = deque()
        self._seconds_per_answer = 1.0
        self._published = 0.0
        self._trimmed = 0.0
        self._held = Snapshot()
        self._in_turn = 0
        self._begun: list[Job] = []  # all that have an answer, in a turn or not
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

    @property
    def sizes(self) -> RequestSizes:
        """What requests may hold beside the model, as the plan has it."""
        assert self.loaded is not None, "asked once it is ready"
        runtime: Runtime = self.loaded.model.conmoe
        budget = 0 if runtime.budget is None else runtime.budget.device_bytes
        return request_sizes(budget, runtime.context, self.loaded.fewest.longest)

    @property
    def most(self) -> int:
        """Answers that it can have at once, those that wait included."""
        return self._most

    def submit(self, job: Job) -> None:
        """Line up.

        Raises:
            Busy: it was not taken in.
        """
        with self._wake:
            if self._state != "ready":
                raise Busy("loading" if self._state == "loading" else "stopping", 5)
            if len(self._waiting) + len(self._running) + self._in_turn >= self._most:
                raise Busy("full", self.wait_estimate())
            self._waiting.add(job.client, job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """The client is gone. Does nothing where the answer is over."""
        with self._wake:
            job.cancelled = True
            if self._waiting.remove(job):
                self._metrics.answer("cancelled", 0, 0, 0)
            self._wake.notify()

    def withdraw(self, *jobs: Job) -> bool:
        """Take the jobs of a request out of the queue for another one's sake; False where one of them does not wait
        there."""
        with self._wake:
            if not all(job in self._waiting for job in jobs):
                return False
            for job in jobs:
                self._waiting.remove(job)
        for job in jobs:
            self._metrics.answer("cancelled", 0, 0, 0)
            job.tell(Failed(Busy("full", self.wait_estimate())))
        return True

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
                sharing = self._sharing()
                if len(sharing) > 1:
                    self._shared_round(sharing)
                else:
                    for _ in range(len(self._running)):
                        self._take([self._running.popleft()], self._turns)
        except BaseException as caught:
            error = caught
        finally:
            with self._wake:
                self._state = "failed" if error is not None else "stopping"
                left = [*self._running, *self._waiting.drain()]
                self._running.clear()
            for job in left:
                job.tell(Failed(error or Busy("stopping")))
            if self.loaded is not None:
                self._kept.drop_all()
                self.loaded.model.conmoe.close()
            self._publish(force=True)
            self._on_end(error)

    def _open(self) -> None:
        loaded = self._load()
        self._runtime: Runtime = loaded.model.conmoe
        self._ends = end_tokens(loaded.model, loaded.tokenizer)
        self._room = Room(self._runtime.context, STEP_TOKENS, self._runtime.cache_bytes)
        self._chunk = max(1, min(self._runtime.prefill_chunk, self._runtime.context))
        self._kept = KeptPrompts(self._room, self._chunk, loaded.files)
        self._form = form_of_model(loaded.model)
        self._together = may_share(self._runtime)
        with self._wake:
            self.loaded = loaded
            if self._state == "loading":
                self._state = "ready"
            self._publish(force=True)
        if self._on_ready is not None:
            self._on_ready(loaded)

    def _next_round(self) -> bool:
        """Start the jobs that have room; sleep where there are none. False at the end."""
        with self._wake:
            while True:
                while (job := self._waiting.first()) is not None and self._starts(job):
                    pass
                if self._running:
                    return True
                if self._state != "ready":
                    return False
                self._publish(force=True)
                self._trim()
                self._wake.wait()

    def _trim(self) -> None:
        """With nothing to do, now and then: what answers and texts left in the heap goes back."""
        now = time.perf_counter()
        if self._runtime.device.type == "cpu" and now - self._trimmed >= TRIM_SECONDS:
            trim_heap()
            self._trimmed = now

    def _starts(self, job: Job) -> bool:
        """Whether the next in line left the queue: it runs, or there is not even the memory to begin with it."""
        try:
            if not self._may_start(job):
                return False
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._room.give_back(job.reserved)
            job.reserved, job.answer = 0, None
            self._metrics.answer("failed", 0, 0, 0)
            job.tell(Failed(error))
            self._waiting.pop()
            return True
        self._waiting.pop()
        self._running.append(job)
        return True

    def _may_start(self, job: Job) -> bool:
        """Reserve room for the next in line, and begin with what is known of its prompt. False where it has to wait."""
        if len(self._running) >= self._parallel:
            return False
        assert self.loaded is not None, "the engine runs"
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        longest = job.settings.filled(model.generation_config).max_tokens or 0
        nbytes = self._room.nbytes(self._room.tokens(len(job.tokens) + longest))
        if not self._room.fits(nbytes):
            return False
        self._room.take(nbytes)
        job.reserved = nbytes
        self._runtime.make_room(self._room.worth(self._kept.nbytes))
        job.started = time.perf_counter()
        cached = CachedTokens(model, self._chunk, self._retreat)
        self._know(job, cached)
        job.answer = Answer(
            model,
            tokenizer,
            cached,
            job.tokens,
            job.settings,
            context=self.context,
            ends=self._ends,
        )
        self._begun.append(job)
        return True

    def _know(self, job: Job, cached: CachedTokens) -> None:
        """Begin with what is known of a prompt, and keep what it will bring."""
        cached.wants_end = self._kept.wanted_ends(job.tokens, self._form)
        cached.may_keep_ends = lambda: self._kept.make_way(self._using())
        if self._kept.files is not None:
            cached.on_chunk = self._kept.files.write
        running = [_answer(one).cached for one in self._begun]
        self._kept.begin(cached, job.tokens, self._form, running, self._using())

    def _using(self) -> int:
        """Bytes of the room that answers take when their next turn is over, with the ends of chunks beside them."""
        return sum(self._takes(one) for one in self._begun)

    def _takes(self, job: Job) -> int:
        answer = _answer(job)
        held = len(answer.cached.held)
        if not answer.cached.in_chunks:
            return job.reserved
        more = self._chunk if held < answer.prompt_length else TURN_TOKENS
        taken = self._room.nbytes(self._room.tokens(held + more))
        ends = 0 if self._room.counts_tokens else answer.cached.ends_bytes
        return min(job.reserved, taken) + ends

    def _make_way(self) -> None:
        """Before a turn: what its answers need is not kept prompts'."""
        if not self._kept.make_way(self._using()):
            for job in self._begun:
                _answer(job).cached.forget_ends()

    def _retreat(self) -> bool:
        """Memory ran out: give up kept prompts first, then cache slots."""
        return self._kept.drop_all() or self._runtime.retreat()

    def _sharing(self) -> list[Job]:
        """The answers whose next tokens can be made in one step."""
        if self._together is None:
            return []
        return [job for job in self._running if is_next_single(_answer(job))]

    def _shared_round(self, sharing: Sequence[Job]) -> None:
        """A token of each of ``sharing``, and a chunk of the prompt that waits for one for the longest time."""
        for job in sharing:
            self._running.remove(job)
        prompt = self._running.popleft() if self._running else None
        if prompt is not None:
            self._take([prompt], self._turns)
        self._take(sharing, self._shared_turn)

    def _take(self, jobs: Sequence[Job], turn: Callable[[Sequence[Job]], Sequence[Job]]) -> None:
        """Jobs that were taken out of the running have their ``turn``; those that it gives go on behind the others."""
        self._in_turn = len(jobs)
        self._make_way()
        going_on = turn(jobs)
        self._in_turn = 0
        self._running.extend(going_on)
        self._publish()

    def _turns(self, jobs: Sequence[Job]) -> list[Job]:
        """One after the other; those that go on."""
        return [job for job in jobs if self._turn(job)]

    def _turn(self, job: Job) -> bool:
        """A chunk of the prompt or a few tokens of the answer; whether it goes on."""
        answer = _answer(job)
        tokens = 1 if self._runtime.residency.all_resident else TURN_TOKENS
        for _ in range(tokens):
            first = answer.first_at is None
            if not self._step(job, answer.step):
                return False
            if first:
                break
        return True

    def _shared_turn(self, jobs: Sequence[Job]) -> list[Job]:
        """A token of each in one step; those that go on. Where the step cannot be shared each makes its own."""
        assert self._together is not None, "there is a step to share"
        going = []
        for job in jobs:
            if job.cancelled:
                self._over(job, "cancelled")
            else:
                going.append(job)
        left: list[Job] = []
        for start in range(0, len(going), MOST_TOGETHER):
            some = going[start : start + MOST_TOGETHER]
            try:
                scores = shared_scores(self._together, [_answer(job) for job in some])
            except Exception as error:
                for job in some:
                    self._failed(job, error)
                continue
            if scores is None:
                left += self._turns(some)
                continue
            drawn = zip(some, scores, strict=True)
            left += [job for job, row in drawn if self._step(job, _drawn(job, row))]
        return left

    def _step(self, job: Job, step: Callable[[], str]) -> bool:
        """A forward of an answer, or what follows it, and what is told of it; whether the answer goes on."""
        answer = _answer(job)
        if job.cancelled:
            self._over(job, "cancelled")
            return False
        first, before = answer.first_at is None, answer.made
        try:
            piece = step()
        except Exception as error:
            self._failed(job, error)
            return False
        finally:
            self._count(answer.made - before)
        if first and answer.first_at is not None:
            self._metrics.first_token(answer.first_at - job.arrived)
        scores, answer.scores = tuple(answer.scores), []
        if piece or scores:
            job.tell(Piece(piece, scores))
        if answer.finish is not None:
            finish = "stop" if answer.finish == "stop" else "length"
            self._over(job, finish)
            job.tell(Done(finish, _usage(answer), answer.met_stop))
            return False
        return True

    def _failed(self, job: Job, error: Exception) -> None:
        """End an answer that could not be made."""
        _answer(job).cached.forget()
        self._over(job, "failed")
        job.tell(Failed(error))

    def _over(self, job: Job, outcome: Outcome) -> None:
        """Give back the room, or keep the prompt for a next request."""
        answer = _answer(job)
        usage = _usage(answer)
        self._metrics.answer(outcome, usage.prompt, usage.cached, usage.completion)
        spent = time.perf_counter() - job.started
        self._seconds_per_answer += 0.2 * (spent - self._seconds_per_answer)
        self._begun.remove(job)
        self._kept.end(answer.cached, self._using())
        self._room.give_back(job.reserved)
        job.reserved = 0
        job.answer = (
            None  # a job may live on in a cycle of its client's coroutine; its cache must not
        )
        self._publish(force=True)

    def _count(self, tokens: int) -> None:
        now = time.perf_counter()
        if tokens:
            self._made.append((now, tokens))
        while self._made and now - self._made[0][0] > SPEED_WINDOW:
            self._made.popleft()

    def _speed(self) -> float:
        now = time.perf_counter()
        recent = [(at, tokens) for at, tokens in list(self._made) if now - at <= SPEED_WINDOW]
        if len(recent) < 2:
            return 0.0
        span = max(now - recent[0][0], 1e-3)
        return sum(tokens for _, tokens in recent[1:]) / span

    def wait_estimate(self) -> int:
        """Seconds until there may be a place for one more."""
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
            tokens_per_second=self._speed(),
        )

    def _publish(self, force: bool = False) -> None:
        """Note the runtime's figures for readers on other threads, now and then. On the engine's thread."""
        now = time.perf_counter()
        if self.loaded is None or (not force and now - self._published < PUBLISH_SECONDS):
            return
        self._published = now
        self._held = Snapshot(
            cache_bytes=self._room.used,
            cache_total_bytes=self._room.total,
            kept=KeptFigures.of(self._kept),
            runtime=self._runtime.stats(),
            fast_path=self._runtime.fast_path,
        )


def _answer(job: Job) -> Answer:
    assert job.answer is not None, "it was started"
    return job.answer


def _drawn(job: Job, scores: Tensor) -> Callable[[], str]:
    """A step whose forward is over: the next token is drawn from its ``scores``."""
    answer = _answer(job)
    return lambda: answer.said(answer.draw(scores))


def _usage(answer: Answer) -> Usage:
    return Usage(answer.prompt_length, answer.made, answer.reused, answer.thought)
