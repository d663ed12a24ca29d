"""Chat sessions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.errors import ContextFull, OutOfMemory, UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.prompt import prompt_tokens
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.session import ChatSession
from tests.families import tiny_model
from tests.hand_packages import thirds, write_package

DEMO = Path(__file__).parents[3] / "conmoe_edge" / "data" / "demo"
HELLO = [{"role": "user", "content": "Tell me about the river and the sea."}]
CHUNK = 16
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe", vocab_size=4096, max_position_embeddings=512, eos_token_id=5)
    return write_package(plain, tmp_path_factory.mktemp("package"), thirds(plain))


@pytest.fixture
def model(folder: Path) -> Any:
    return load_package(folder, slots=(4,), context=200)


def _reply(session: ChatSession, messages: list[dict[str, str]], **settings: Any) -> str:
    stop_event = settings.pop("stop_event", None)
    drawn = SamplingSettings(**{"max_tokens": 12, "temperature": 0, **settings})
    return "".join(session.reply(messages, drawn, stop_event=stop_event))


def _generated(model: Any, tokenizer: Any, messages: list[dict[str, str]], count: int = 12) -> str:
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_streamed_text_is_what_generate_says(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    pieces = list(session.reply(HELLO, SamplingSettings(max_tokens=12, temperature=0)))
    assert "".join(pieces) == _generated(model, tokenizer, HELLO)
    assert len(pieces) > 3
    last = session.last
    assert last is not None
    assert (last.tokens, last.finish) == (12, "length")
    assert last.seconds_to_first > 0 and last.tokens_per_second > 0
    assert (
        last.misses > 0 and last.bytes_read == last.misses * model.conmoe.manifest.layouts[0].nbytes
    )


def test_chunks_of_the_prompt_do_not_change_the_answer(folder: Path, tokenizer: Any) -> None:
    whole = ChatSession(load_package(folder), tokenizer)
    pieces = ChatSession(load_package(folder, slots=(1,)), tokenizer)
    pieces._cached.chunk = 3
    assert _reply(whole, HELLO) == _reply(pieces, HELLO)


def test_the_next_turn_begins_with_the_whole_chunks_of_the_last(model: Any, tokenizer: Any) -> None:
    model.conmoe.prefill_chunk = CHUNK
    session = ChatSession(model, tokenizer)
    answer = _reply(session, HELLO)
    first = session.last
    assert first is not None
    turns = [
        *HELLO,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And the boats?"},
    ]
    second = _reply(session, turns)
    assert session.last is not None
    total = len(prompt_tokens(tokenizer, turns))
    assert first.prompt_tokens > CHUNK
    assert session.last.prompt_tokens == total - first.prompt_tokens // CHUNK * CHUNK
    assert second == _reply(ChatSession(model, tokenizer), turns)


def test_another_conversation_keeps_the_common_beginning(model: Any, tokenizer: Any) -> None:
    model.conmoe.prefill_chunk = 8
    session = ChatSession(model, tokenizer)
    _reply(session, HELLO)
    other = [{"role": "user", "content": "Tell me about the river and a bridge over it."}]
    answer = _reply(session, other)
    assert session.last is not None
    assert session.last.prompt_tokens == len(prompt_tokens(tokenizer, other)) - 8
    assert answer == _reply(ChatSession(model, tokenizer), other)
    session.forget()
    assert session.context_used == 0
    assert answer == _reply(session, other)


def test_the_same_seed_gives_the_same_answer(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    drawn = [_reply(session, HELLO, temperature=1.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    # With nearly all the likelihood cut off, drawing is greedy.
    assert _reply(session, HELLO, temperature=1.0, top_p=1e-6, seed=4) == _reply(session, HELLO)


def test_stops_at_the_end_token(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    ids = tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ].tolist()
    model.generation_config.eos_token_id = [out[5]]
    cut = out.index(out[5])
    assert _reply(session, HELLO) == tokenizer.decode(out[:cut], skip_special_tokens=True)
    assert session.last is not None and session.last.finish == "stop"


def test_a_stop_takes_effect_within_a_token(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    stop = threading.Event()
    pieces = []
    for piece in session.reply(
        HELLO, SamplingSettings(max_tokens=50, temperature=0), stop_event=stop
    ):
        pieces.append(piece)
        if len(pieces) == 3:
            stop.set()
    assert session.last is not None and session.last.finish == "interrupted"
    assert session.last.tokens <= 5 and len(pieces) <= 4
    assert _generated(model, tokenizer, HELLO).startswith("".join(pieces).rstrip("\ufffd"))
    assert _reply(session, HELLO) == _generated(model, tokenizer, HELLO)


def test_a_stop_before_the_first_token(model: Any, tokenizer: Any) -> None:
    stop = threading.Event()
    stop.set()
    session = ChatSession(model, tokenizer)
    assert _reply(session, HELLO, stop_event=stop) == ""
    assert session.last is not None and (session.last.tokens, session.last.finish) == (
        0,
        "interrupted",
    )


def test_leaving_the_stream_ends_the_turn(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    stream: Any = session.reply(HELLO, SamplingSettings(max_tokens=50, temperature=0))
    next(stream)
    stream.close()
    assert session.last is not None and session.last.finish == "interrupted"
    assert _reply(session, HELLO) == _generated(model, tokenizer, HELLO)


def test_a_question_that_does_not_fit_is_refused_whole(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer, context=40)
    with pytest.raises(ContextFull, match="planned for 40"):
        _reply(session, [{"role": "user", "content": "words and " * 40}])
    assert session.context_used == 0


def test_an_answer_that_fills_the_context_says_so(model: Any, tokenizer: Any) -> None:
    prompt = len(
        tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    )
    session = ChatSession(model, tokenizer, context=prompt + 6)
    seen: list[str] = []
    with pytest.raises(ContextFull):
        for piece in session.reply(HELLO, SamplingSettings(max_tokens=50, temperature=0)):
            seen.append(piece)
    assert session.last is not None and session.last.finish == "context"
    assert session.context_used == prompt + 6
    assert "".join(seen) == _generated(model, tokenizer, HELLO, 7)


def test_a_longer_context_than_was_loaded_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="200"):
        ChatSession(model, tokenizer, context=201)


def test_generate_cannot_grow_past_the_context_either(folder: Path) -> None:
    model = load_package(folder, slots=(4,), context=24)
    ids = torch.arange(10, 30)[None]
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == 24
    with pytest.raises(ContextFull, match="25 tokens"):
        model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with pytest.raises(ContextFull):
        model.generate(ids.expand(2, -1), max_new_tokens=1, do_sample=False)
    with pytest.raises(ContextFull, match="40 tokens"):
        model(ids.repeat(1, 2), use_cache=False)


def _failing(model: Any, fails: Callable[[int], bool]) -> list[int]:
    """Let the ``n``-th request for prototypes raise torch's allocation error where ``fails(n)``;
    returns the counter.
    """
    calls = [0]
    residency = type(model.conmoe.residency)

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **how: Any) -> Any:
            calls[0] += 1
            if fails(calls[0]):
                raise RuntimeError(NO_MEMORY)
            return real(*args, **how)

        return ask

    residency.visit = failing(residency.visit)
    residency.resident = failing(residency.resident)
    return calls


@pytest.fixture
def restored() -> Any:
    """Give ``Residency`` its methods back after a test that replaced them."""
    from conmoe_edge.offload.residency.residency import Residency

    before = Residency.visit, Residency.resident
    yield
    Residency.visit, Residency.resident = before


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("nth", [1, 2, 5, 8, 20, 33])
def test_memory_that_runs_out_costs_slots_and_not_words(
    folder: Path, tokenizer: Any, nth: int
) -> None:
    model = load_package(folder, context=200)
    expected = _reply(ChatSession(model, tokenizer), HELLO)
    slots = model.conmoe.stats().slots
    _failing(model, lambda call: call == nth)
    session = ChatSession(model, tokenizer)
    assert _reply(session, HELLO) == expected
    assert model.conmoe.stats().slots == slots // 2


@pytest.mark.usefixtures("restored")
def test_when_nothing_is_left_to_give_up(folder: Path, tokenizer: Any) -> None:
    model = load_package(folder, context=200)
    expected = _reply(ChatSession(model, tokenizer), HELLO)
    short = [True]
    _failing(model, lambda call: short[0])
    session = ChatSession(model, tokenizer)
    with pytest.raises(OutOfMemory):
        _reply(session, HELLO)
    assert model.conmoe.stats().slots == 1
    short[0] = False
    assert _reply(session, HELLO) == expected, "the session answers again"


@pytest.mark.usefixtures("restored")
def test_other_errors_are_not_swallowed(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    expected = _reply(session, HELLO)
    residency = type(model.conmoe.residency)
    visit = residency.visit

    def broken(self: Any, numbers: Any, compute: Any, **how: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    residency.visit = broken
    with pytest.raises(RuntimeError, match="mat1"):
        _reply(
            session,
            [*HELLO, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}],
        )
    residency.visit = visit
    assert _reply(session, HELLO) == expected, "the half-grown cache was dropped"


@pytest.mark.parametrize("where", [3, 20])
def test_a_stop_string_ends_the_answer(model: Any, tokenizer: Any, where: int) -> None:
    session = ChatSession(model, tokenizer)
    whole = _reply(session, HELLO)
    stop = whole[where : where + 3]
    assert _reply(session, HELLO, stop=("never said", stop)) == whole[: whole.index(stop)]
    assert session.last is not None and session.last.finish == "stop"
    assert session.last.tokens < 12
    assert _reply(session, HELLO) == whole


def test_greedy_tokens_obey_no_end_mark(model: Any, tokenizer: Any) -> None:
    ids = torch.arange(10, 30)[None]
    wanted = model.generate(
        ids, max_new_tokens=9, min_new_tokens=9, do_sample=False, eos_token_id=[]
    )
    model.generation_config.eos_token_id = [int(wanted[0, 23])]
    model.generation_config.repetition_penalty = 1.7
    generation = ChatSession(model, tokenizer).greedy(range(10, 30), 9)
    forwards = 0
    while generation.finish is None:
        generation.advance()
        forwards += 1
    assert generation.tokens == wanted[0].tolist()
    assert (generation.finish, generation.made, generation.prompt_length) == ("length", 9, 20)
    assert forwards == 9
    with pytest.raises(ContextFull, match="201 tokens"):
        ChatSession(model, tokenizer).greedy([7] * 201, 1)


def test_a_model_without_template_completes(model: Any, tokenizer: Any) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        text = _reply(
            ChatSession(model, tokenizer), [{"role": "user", "content": "Once upon a time"}]
        )
    finally:
        tokenizer.chat_template = template
    ids = tokenizer("Once upon a time", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert text == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_template_that_refuses_is_the_users_error(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="refuses"):
        _reply(ChatSession(model, tokenizer), [{"role": "developer", "content": "x"}])
    with pytest.raises(UsageError):
        _reply(ChatSession(model, tokenizer), [])
