"""Answers that share the steps of their tokens, in an engine of this process."""

from __future__ import annotations

import queue
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.prompt import prompt_tokens
from conmoe_edge.offload.kernels.cpu.bindings import operator
from conmoe_edge.offload.runtime import Runtime
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.jobs import Done, Event, Failed, Job, Loaded, Piece
from conmoe_edge.serve.prometheus import Metrics
from tests.families import tiny_model
from tests.hand_packages import identity, write_package
from tests.patience import PATIENCE
from tests.serve.test_engine import DEMO, QUESTIONS, Driven, finished, greedy

CONTEXT, CHUNK = 4096, 64
pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model(
        *("olmoe", 0, torch.bfloat16),
        **{"vocab_size": 4096, "max_position_embeddings": CONTEXT, "eos_token_id": 5},
    )
    target = tmp_path_factory.mktemp("package")
    return write_package(plain, target, identity(plain), prefill_chunk=CHUNK)


class Sharing(Driven):
    """An engine whose answers share steps."""

    def __init__(self, folder: Path, tokenizer: Any, **settings: Any) -> None:
        self.settings = settings.pop("load", {})
        super().__init__(folder, tokenizer, **{"parallel": 16, "queue": 64, **settings})

    def _loaded(self, folder: Path) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return load_package(folder, device="cpu", context=CONTEXT, **self.settings)

    def end(self) -> None:
        self.engine.stop()
        assert self.engine.join(PATIENCE) and self.ends == [None]

    @property
    def shared(self) -> int:
        """Layers of tokens that were made in shared steps."""
        assert self.engine.loaded is not None
        runtime: Runtime = self.engine.loaded.model.conmoe
        assert runtime.fast_path is not None
        return runtime.fast_path.live()["together"]


def questions(count: int) -> list[tuple[str, int]]:
    draw = Random(count)
    words = ["the", "a", "river", "sea", "light", "boat", "of", "and", "in", "to", "was", "rock"]
    return [
        (" ".join(draw.choices(words, k=draw.randint(3, 120))), draw.randint(3, 60))
        for _ in range(count)
    ]


@pytest.mark.parametrize("slots", [None, (5,)])
def test_company_changes_nobodys_tokens(folder: Path, tokenizer: Any, slots: Any) -> None:
    asked = questions(20)
    by_itself = Sharing(folder, tokenizer, parallel=1)
    alone = [finished(by_itself.ask(*one)[1])[0] for one in asked]
    assert by_itself.shared == 0
    by_itself.end()
    driven, draw = Sharing(folder, tokenizer, load={"slots": slots}), Random(3)
    told = []
    with driven.hold.held() as let_pass:
        for question, tokens in asked:
            told.append(driven.ask(question, tokens, client=str(draw.random()))[1])
            if draw.random() < 0.3:
                let_pass(draw.randint(1, 6))
    assert [finished(one)[0] for one in told] == alone
    assert driven.shared > 3 * 200
    driven.end()


def test_a_long_prompt_starves_nobody(folder: Path, tokenizer: Any) -> None:
    """Between two chunks of prompts every answer makes a token, and prompts take turns."""
    driven = Sharing(folder, tokenizer)
    order: list[str] = []
    own = driven.engine._turn

    def turn(job: Job) -> bool:
        if len(job.tokens) > 600:
            order.append(f"prompt {len(job.tokens)}")
        return own(job)

    shared = driven.engine._shared_turn

    def shared_turn(jobs: Any) -> Any:
        order.append("shared")
        return shared(jobs)

    with driven.hold.held() as let_pass:
        told = [driven.ask(question, 400)[1] for question in QUESTIONS[:2]]
        driven.until(lambda: driven.engine.snapshot.running == 2)
        let_pass(6)
        for one in told:
            assert isinstance(one.get(timeout=PATIENCE), Piece)
        driven.engine._turn, driven.engine._shared_turn = turn, shared_turn  # pyright: ignore
        long = [driven.ask("word " * count, 2)[1] for count in (700, 710)]
        driven.until(lambda: driven.engine.snapshot.running == 4)
    for one in long:
        finished(one)
    for one in told:
        assert isinstance(finished(one)[1], Done)
    first = order.index(next(one for one in order if one.startswith("prompt")))
    during = order[first : first + 20]
    assert during.count("shared") >= 9
    assert len({one for one in during if one.startswith("prompt")}) == 2
    driven.end()


def test_who_leaves_or_fails_takes_nobody_along(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven = Sharing(folder, tokenizer)
    text = finished(driven.ask(QUESTIONS[0], 40)[1])[0]
    stays, leaves = driven.ask(QUESTIONS[0], 40)[1], driven.ask(QUESTIONS[1], 400)
    assert isinstance(leaves[1].get(timeout=PATIENCE), Piece)
    driven.engine.cancel(leaves[0])
    assert finished(stays)[0] == text
    driven.idle()
    assert driven.engine._room.used == 0

    assert driven.engine.loaded is not None
    report = driven.engine.loaded.model.conmoe.fast_path
    kind = type(report.together)
    monkeypatch.setattr(kind, "scores", broken)
    both = [driven.ask(question, 40)[1] for question in QUESTIONS[:2]]
    for one in both:
        event = last(one)
        assert isinstance(event, Failed) and isinstance(event.error, ZeroDivisionError)
    monkeypatch.undo()
    assert finished(driven.ask(QUESTIONS[0], 40)[1])[0] == text
    driven.end()


def broken(*arguments: Any) -> Any:
    """A fault of our own is told, to all whose step it was."""
    raise ZeroDivisionError


def last(told: queue.Queue[Event]) -> Event:
    while isinstance(event := told.get(timeout=PATIENCE), Piece):
        pass
    return event


def test_models_that_share_no_steps_take_turns(tokenizer: Any, tmp_path: Path) -> None:
    plain = tiny_model(
        "olmoe", 0, torch.float32, vocab_size=4096, max_position_embeddings=512, eos_token_id=5
    )
    folder = write_package(plain, tmp_path / "package", identity(plain))
    engine = Engine(
        lambda: Loaded(load_package(folder, device="cpu", context=512), tokenizer),
        **{"parallel": 4, "queue": 8, "metrics": Metrics(), "on_end": lambda _: None},
    )
    engine.start()
    told: list[queue.Queue[Event]] = []
    while engine.snapshot.state == "loading":
        pass
    for question in QUESTIONS[:3]:
        told.append(queue.Queue())
        prompt = prompt_tokens(tokenizer, [{"role": "user", "content": question}])
        engine.submit(Job(tuple(prompt), greedy(8), "", told[-1].put))
    assert all(isinstance(last(one), Done) for one in told)
    assert engine.loaded is not None
    report = engine.loaded.model.conmoe.fast_path
    assert report.together is None and "float32" in report.apart
    engine.stop()
    assert engine.join(PATIENCE)
