"""The engine on a tiny model with few cache slots, in this process."""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conmoe_edge.errors import OutOfMemory
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.prompt import prompt_tokens
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.session import ChatSession
from conmoe_edge.serve.busy import Busy
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.jobs import Done, Event, Failed, Job, Loaded, Piece
from conmoe_edge.serve.prometheus import Metrics
from tests.families import tiny_model
from tests.hand_packages import thirds, write_package
from tests.patience import PATIENCE, wait_for
from tests.serve.held_rounds import EngineHold

DEMO = Path(__file__).parents[2] / "conmoe_edge" / "data" / "demo"
QUESTIONS = tuple(
    f"Tell me about the {thing} and the sea."
    for thing in ("river", "boat", "rock", "light", "wind")
)
CONTEXT = 512
TOKENS = 12


def greedy(tokens: int) -> SamplingSettings:
    return SamplingSettings(temperature=0, max_tokens=tokens)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe", vocab_size=4096, max_position_embeddings=CONTEXT, eos_token_id=5)
    return write_package(plain, tmp_path_factory.mktemp("package"), thirds(plain))


@pytest.fixture(scope="module")
def alone(folder: Path, tokenizer: Any) -> dict[str, str]:
    """What a chat with every prototype resident says."""
    model = load_package(folder, context=CONTEXT)
    said = {
        question: "".join(
            ChatSession(model, tokenizer).reply(
                [{"role": "user", "content": question}], greedy(TOKENS)
            )
        )
        for question in QUESTIONS
    }
    model.conmoe.close()
    return said


CHUNK = 64


class Driven:
    """An engine and what it told."""

    def __init__(self, folder: Path, tokenizer: Any, **settings: Any) -> None:
        self.tokenizer = tokenizer
        self.metrics = Metrics()
        self.ends: list[BaseException | None] = []
        self.engine = Engine(
            lambda: Loaded(self._loaded(folder), tokenizer),
            **{"parallel": 4, "queue": 8, **settings},
            metrics=self.metrics,
            on_end=self.ends.append,
        )
        self.hold = EngineHold(self.engine)
        self.engine.start()
        self.until(lambda: self.engine.snapshot.state == "ready")

    @staticmethod
    def _loaded(folder: Path) -> Any:
        model: Any = load_package(folder, slots=(3,), context=CONTEXT)
        model.conmoe.prefill_chunk = CHUNK  # a question is longer than one
        return model

    def until(self, condition: Any) -> None:
        wait_for(condition)

    def ask(self, question: str, tokens: int = TOKENS, client: str = "") -> tuple[Job, Any]:
        told: queue.Queue[Event] = queue.Queue()
        prompt = prompt_tokens(self.tokenizer, [{"role": "user", "content": question}])
        job = Job(tuple(prompt), greedy(tokens), client, told.put)
        self.engine.submit(job)
        return job, told

    def idle(self) -> None:
        self.until(lambda: self.engine.snapshot.running == self.engine.snapshot.queued == 0)


def test_a_job_that_is_over_lets_go_of_its_cache(folder: Path, tokenizer: Any) -> None:
    """A client's coroutine may keep its job alive in a cycle, which Python collects late or never."""
    driven = Driven(folder, tokenizer)
    job, told = driven.ask(QUESTIONS[0])
    finished(told)
    driven.idle()
    assert job.answer is None
    driven.engine.stop()
    assert driven.engine.join(PATIENCE)


def finished(told: Any) -> tuple[str, Done]:
    text = ""
    while True:
        one = told.get(timeout=PATIENCE)
        if isinstance(one, Piece):
            text += one.text
        else:
            assert isinstance(one, Done), one
            return text, one


@pytest.fixture
def driven(folder: Path, tokenizer: Any) -> Iterator[Driven]:
    one = Driven(folder, tokenizer)
    yield one
    one.engine.stop()
    assert one.engine.join(PATIENCE)
    assert one.ends == [None]


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_turns_change_nobodys_tokens(
    folder: Path, tokenizer: Any, alone: dict[str, str], parallel: int
) -> None:
    driven = Driven(folder, tokenizer, parallel=parallel)
    asked = {question: driven.ask(question)[1] for question in QUESTIONS}
    assert {question: finished(told)[0] for question, told in asked.items()} == alone
    driven.engine.stop()
    assert driven.engine.join(PATIENCE)


def test_a_prompt_that_was_kept_changes_nothing_either(driven: Driven) -> None:
    long = QUESTIONS[0] + " It was quiet, and nobody came up the stairs that night." * 6
    chunk = driven.engine._chunk
    first, done = finished(driven.ask(long)[1])
    assert done.usage.cached == 0
    again, done = finished(driven.ask(long)[1])
    assert again == first
    assert done.usage.cached == (done.usage.prompt - 1) // chunk * chunk > 0
    other, done = finished(driven.ask(long + " Then?")[1])
    assert done.usage.cached > 0
    driven.engine._kept.drop_all()
    assert finished(driven.ask(long + " Then?")[1])[0] == other


def test_nobody_takes_more_room_than_there_is(driven: Driven, alone: dict[str, str]) -> None:
    most: list[int] = []
    room = driven.engine._room
    take = room.take

    def watched(nbytes: int) -> None:
        take(nbytes)
        most.append(room.used)

    room.take = watched
    asked = [
        driven.ask(question, tokens=300)[0:2] for question in QUESTIONS
    ]  # each takes all of it
    for _, told in asked:
        finished(told)
    assert max(most) <= room.total
    assert finished(driven.ask(QUESTIONS[1])[1])[0] == alone[QUESTIONS[1]]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("output_router_logits", True),
        ("output_hidden_states", True),
        ("output_attentions", True),
        ("return_dict", False),
        ("use_cache", False),
        ("torchscript", True),
    ],
)
def test_flags_of_the_config_change_nothing(
    flag: str, value: bool, folder: Path, tokenizer: Any, alone: dict[str, str], tmp_path: Path
) -> None:
    package = Path(shutil.copytree(folder, tmp_path / "package"))
    path = package / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), flag: value}))
    driven = Driven(package, tokenizer)
    assert finished(driven.ask(QUESTIONS[0])[1])[0] == alone[QUESTIONS[0]]
    driven.engine.stop()
    assert driven.engine.join(PATIENCE)


@pytest.mark.parametrize("when", ["waiting", "prompt", "answer"])
def test_cancelled_is_freed(driven: Driven, alone: dict[str, str], when: str) -> None:
    room = driven.engine._room
    question = "word " * 380 if when == "prompt" else QUESTIONS[1]
    with driven.hold.held(after={"waiting": 0, "prompt": 1, "answer": 8}[when]):
        blocker = driven.ask(QUESTIONS[0], tokens=400)[0] if when == "waiting" else None
        job, told = driven.ask(question, tokens=400)
        if when == "waiting":
            driven.until(lambda: driven.engine.snapshot.queued == 1)
        elif when == "prompt":
            driven.until(lambda: driven.engine.snapshot.running == 1)
        else:
            assert isinstance(told.get(timeout=PATIENCE), Piece)
        driven.engine.cancel(job)
        if blocker is not None:
            driven.engine.cancel(blocker)
        driven.idle()
        assert room.used == 0
        assert all(not isinstance(event, Done) for event in list(told.queue))
    assert finished(driven.ask(QUESTIONS[2])[1])[0] == alone[QUESTIONS[2]]


def test_memory_that_runs_out_costs_no_words(driven: Driven, alone: dict[str, str]) -> None:
    finished(driven.ask(QUESTIONS[0])[1])
    assert driven.engine.loaded is not None
    runtime = driven.engine.loaded.model.conmoe
    slots = runtime.stats().slots
    _fail(runtime, {9})
    asked = {question: driven.ask(question)[1] for question in QUESTIONS}
    assert {question: finished(told)[0] for question, told in asked.items()} == alone
    assert runtime.stats().slots < slots


def test_memory_that_is_gone_fails_the_answer_and_not_the_engine(
    driven: Driven, alone: dict[str, str]
) -> None:
    assert driven.engine.loaded is not None
    undo = _fail(driven.engine.loaded.model.conmoe, None)
    _, told = driven.ask(QUESTIONS[0])
    event = told.get(timeout=PATIENCE)
    assert isinstance(event, Failed) and isinstance(event.error, OutOfMemory)
    undo()
    assert finished(driven.ask(QUESTIONS[0])[1])[0] == alone[QUESTIONS[0]]


def _fail(runtime: Any, calls: set[int] | None) -> Any:
    """Let the numbered requests for prototypes raise torch's allocation error; all, for ``None``."""
    kind = type(runtime.residency)
    visit, resident = kind.visit, kind.resident
    count = [0]

    def failing(real: Any) -> Any:
        def ask(*args: Any, **how: Any) -> Any:
            count[0] += 1
            if calls is None or count[0] in calls:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
            return real(*args, **how)

        return ask

    def undo() -> None:
        kind.visit, kind.resident = visit, resident

    kind.visit, kind.resident = failing(visit), failing(resident)
    _UNDO.append(undo)
    return undo


_UNDO: list[Any] = []


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    while _UNDO:
        _UNDO.pop()()


def test_full_and_stopping_are_said(folder: Path, tokenizer: Any) -> None:
    driven = Driven(folder, tokenizer, parallel=1, queue=1)
    with driven.hold.held():
        running, _ = driven.ask(QUESTIONS[0], tokens=400)
        _, waiting = driven.ask(QUESTIONS[1], tokens=400)
        with pytest.raises(Busy) as caught:
            driven.ask(QUESTIONS[2])
        assert caught.value.reason == "full" and caught.value.retry_after >= 1
        driven.engine.stop()
        event = waiting.get(timeout=PATIENCE)
        assert isinstance(event, Failed) and isinstance(event.error, Busy)
        with pytest.raises(Busy) as caught:
            driven.ask(QUESTIONS[2])
        assert caught.value.reason == "stopping"
        driven.engine.cancel(running)
    assert driven.engine.join(PATIENCE)


def test_no_memory_to_begin_with_fails_that_answer_alone(
    driven: Driven, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert driven.engine.loaded is not None
    runtime = driven.engine.loaded.model.conmoe
    left = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
    make_room = runtime.make_room

    def failing(tokens: int) -> None:
        if left:
            raise left.pop()
        make_room(tokens)

    monkeypatch.setattr(runtime, "make_room", failing)
    for _ in range(2):
        _, told = driven.ask(QUESTIONS[0])
        assert isinstance(told.get(timeout=PATIENCE), Failed)
        assert driven.engine._room.used == 0
    assert finished(driven.ask(QUESTIONS[0])[1])[0] == alone[QUESTIONS[0]]


def test_what_waits_can_be_taken_out_and_what_runs_cannot(driven: Driven) -> None:
    with driven.hold.held():
        running, _ = driven.ask(QUESTIONS[0], tokens=400)
        waiting, told = driven.ask(QUESTIONS[1], tokens=400)  # there is no room for both
        driven.until(lambda: driven.engine.snapshot.running == 1)
        assert not driven.engine.withdraw(running)
        assert driven.engine.withdraw(waiting) and not driven.engine.withdraw(waiting)
        event = told.get(timeout=PATIENCE)
        assert isinstance(event, Failed) and isinstance(event.error, Busy)
        driven.engine.cancel(running)
        driven.idle()


def test_an_engine_that_cannot_load_says_why(tokenizer: Any, tmp_path: Path) -> None:
    ends: list[BaseException | None] = []

    def load() -> Loaded:
        raise FileNotFoundError("gone")

    engine = Engine(load, parallel=1, queue=1, metrics=Metrics(), on_end=ends.append)
    engine.start()
    assert engine.join(PATIENCE)
    assert isinstance(ends[0], FileNotFoundError)
    assert engine.snapshot.state == "failed"
