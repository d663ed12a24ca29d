"""The context is a hard limit through every door, and is counted in every family."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, pipeline

from conmoe_edge.compat import Arguments
from conmoe_edge.errors import ContextFull, UnsupportedModel, UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.context_limit import check_context, context_full, guard_context
from conmoe_edge.offload.generation.prompt import prompt_tokens
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.session import ChatSession
from conmoe_edge.offload.runtime import Runtime
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.jobs import Done, Failed, Job, Loaded, Piece
from conmoe_edge.serve.prometheus import Metrics
from tests.families import BY_NAME, tiny_model
from tests.hand_packages import thirds, write_package
from tests.patience import PATIENCE, wait_for

LONG = SamplingSettings(temperature=0, max_tokens=60)
DEMO = Path(__file__).parents[3] / "conmoe_edge" / "data" / "demo"
HELLO = [{"role": "user", "content": "Tell me about the river and the sea."}]
CONTEXT = 48
IDS = torch.arange(10, 18)[None]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Its end token is never the most likely one, so answers are as long as they may be.
    plain = tiny_model("olmoe", vocab_size=4096, max_position_embeddings=512, eos_token_id=4095)
    return write_package(plain, tmp_path_factory.mktemp("package"), thirds(plain))


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What every loaded model asks room for, in turn."""
    asked: list[int] = []
    own = Runtime.make_room

    def make_room(runtime: Runtime, tokens: int) -> None:
        asked.append(tokens)
        own(runtime, tokens)

    monkeypatch.setattr(Runtime, "make_room", make_room)
    return asked


def _counted(rooms: list[int], prompt: int, last: int) -> bool:
    """Room was asked for the prompt, then for a token more each time."""
    return rooms == list(range(prompt, last + 1))


def test_more_room_is_offered_as_far_as_the_model_goes() -> None:
    assert "--context 3072" in context_full(2100, 2048, 4096).fix
    assert "--context 4000" in context_full(3900, 2048, 4000).fix
    assert "--context 3072" in context_full(2100, 2048, None).fix


def test_beyond_the_model_no_context_is_offered() -> None:
    error = context_full(2100, 2048, 2048)
    assert "--context" not in error.fix and "2048" in error.why


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_generate_is_counted_in_every_family(name: str) -> None:
    model = tiny_model(name)
    rooms: list[int] = []
    guard_context(model, 20, rooms.append)
    with pytest.raises(ContextFull, match="21 tokens"):
        model.generate(IDS, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert _counted(rooms, 8, 20)


def test_generate_on_a_package(folder: Path, rooms: list[int]) -> None:
    model: Any = load_package(folder, context=CONTEXT)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    with pytest.raises(ContextFull, match=f"{CONTEXT + 1} tokens"):
        model.generate(IDS, max_new_tokens=60, **settings)
    assert _counted(rooms, 8, CONTEXT)
    rooms.clear()
    with pytest.raises(ContextFull, match=f"{CONTEXT + 2} tokens"):
        model.generate(IDS, max_new_tokens=60, num_beams=2, **settings)
    assert set(rooms) == {CONTEXT}, "a batch counts as a full context"


def test_a_pipeline_on_a_package(folder: Path, tokenizer: Any, rooms: list[int]) -> None:
    model: Any = load_package(folder, context=CONTEXT)
    talk = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt = len(tokenizer("the river")["input_ids"])
    with pytest.raises(ContextFull, match=f"{CONTEXT + 1} tokens"):
        talk("the river", max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert _counted(rooms, prompt, CONTEXT)


def test_a_chat_on_a_package(folder: Path, tokenizer: Any, rooms: list[int]) -> None:
    session = ChatSession(load_package(folder, context=CONTEXT), tokenizer)
    with pytest.raises(ContextFull):
        for _ in session.reply(HELLO, LONG):
            pass
    assert _counted(rooms, len(prompt_tokens(tokenizer, HELLO)), CONTEXT)
    assert session.context_used == CONTEXT


def test_the_server_s_engine_on_a_package(folder: Path, tokenizer: Any, rooms: list[int]) -> None:
    told: queue.Queue[Any] = queue.Queue()
    engine = Engine(
        lambda: Loaded(load_package(folder, context=CONTEXT), tokenizer),
        parallel=1,
        queue=1,
        metrics=Metrics(),
        on_end=lambda error: None,
    )
    engine.start()
    wait_for(lambda: engine.snapshot.state == "ready")
    prompt = prompt_tokens(tokenizer, HELLO)
    try:
        engine.submit(Job(tuple(prompt), LONG, "", told.put))
        event: Any = Piece("")
        while not isinstance(event, Done | Failed):
            event = told.get(timeout=PATIENCE)
    finally:
        engine.stop()
    assert isinstance(event, Done) and event.finish == "length"
    assert event.usage.completion == CONTEXT - len(prompt) + 1
    # The engine makes room for the whole answer when it lets the request in.
    assert rooms[0] == CONTEXT and _counted(rooms[1:], len(prompt), CONTEXT)


def test_arguments_by_position_are_counted_too() -> None:
    model = tiny_model("olmoe")
    guard_context(model, 12)
    place = Arguments.of(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, **{place.cache: cache}, use_cache=True)
        between = (None,) * (place.positional.index(place.cache) - 1)
        with pytest.raises(ContextFull, match="16 tokens"):
            model(IDS, *between, cache)


def test_a_cache_is_counted_though_none_is_asked_for() -> None:
    """transformers fills a cache that it is given, whatever ``use_cache`` says."""
    model = tiny_model("olmoe")
    guard_context(model, 12)
    cache = {Arguments.of(model).cache: DynamicCache(config=model.config)}
    with torch.no_grad():
        model(IDS, use_cache=False, **cache)
        with pytest.raises(ContextFull, match="16 tokens"):
            model(IDS, use_cache=False, **cache)
        with pytest.raises(ContextFull, match="16 tokens"):
            model(IDS.repeat(1, 2), use_cache=False)


def _cache_renamed(
    self: Any, input_ids: Any = None, kept_states: Any = None, **kwargs: Any
) -> None:
    """A forward as a later release might have it."""


def _tokens_renamed(self: Any, tokens: Any = None, cache: Any = None, **kwargs: Any) -> None:
    """Another one."""


@pytest.mark.parametrize("forward", [_cache_renamed, _tokens_renamed])
def test_a_name_that_changes_is_refused_at_load(forward: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    model.forward = MethodType(forward, model)
    with pytest.raises(UnsupportedModel, match="OlmoeForCausalLM") as caught:
        guard_context(model, 12)
    assert "pip install" in caught.value.fix


def test_a_cache_under_a_name_that_is_not_known_is_refused() -> None:
    model = tiny_model("olmoe")
    guard_context(model, 12)
    with pytest.raises(UnsupportedModel, match="kept_states"):
        model(IDS, kept_states=DynamicCache(config=model.config))


def test_a_context_beyond_the_models_positions_is_refused() -> None:
    config = SimpleNamespace(max_position_embeddings=256)
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    for context in (None, 1, 256):
        check_context(model, context)
    with pytest.raises(UsageError, match="257") as caught:
        check_context(model, 257)
    assert caught.value.fix == "--context 256"
