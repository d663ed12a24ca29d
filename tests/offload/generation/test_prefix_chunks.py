"""Chunks of a prompt, cut out of one cache and put into another: what follows is the same to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.integrations.load import load_package
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.kv_rows import row_bytes
from conmoe_edge.offload.generation.answer import Generation
from conmoe_edge.offload.generation.prefix_chunks import (
    Form,
    HeldChunk,
    LayerForm,
    ends_needed,
    form_of_model,
    moves,
    standing_at,
    width_of_row,
)
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.generation.session import ChatSession
from tests.families import VOCAB, tiny_model
from tests.hand_packages import identity, write_package
from tests.scores import Scores, alone, turn

CHUNK, CONTEXT, ANSWER = 16, 1000, 70
CASES = [
    ("olmoe", {}, "source"),
    ("olmoe", {}, "int8"),
    ("mixtral", {"sliding_window": 40}, "source"),
    ("gpt_oss", {"sliding_window": 8}, "source"),
    ("gpt_oss", {"sliding_window": 40}, "int8"),
    ("afmoe", {"sliding_window": 100}, "source"),
    ("deepseek_v3", {}, "int8"),
    ("qwen3_next", {}, "source"),
    ("lfm2_moe", {}, "source"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    family, more, kept = request.param
    plain = tiny_model(family, dtype=torch.bfloat16, max_position_embeddings=1024, **more)
    folder = write_package(
        plain, tmp_path_factory.mktemp("package"), identity(plain), prefill_chunk=CHUNK
    )
    budget = Budget("cpu", 4 << 30, "4GiB", "test", host_bytes=0)
    loaded: Any = load_package(folder, budget=budget, context=CONTEXT, kv_precision=kept)
    yield loaded
    loaded.conmoe.close()


def drawn(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def copied(chunk: HeldChunk) -> HeldChunk:
    layers = [None if one is None else tuple(held.clone() for held in one) for one in chunk.layers]
    return HeldChunk(layers, chunk.has_ends)


def cut(model: Any, prompt: list[int]) -> list[HeldChunk]:
    """The whole chunks of ``prompt``, each as it came in."""
    found: list[HeldChunk] = []
    cached = CachedTokens(model, CHUNK)
    cached.on_chunk = lambda tokens, chunk: found.append(copied(chunk))
    generated(model, cached, prompt, 1)
    return found


def generated(
    model: Any, cached: CachedTokens, prompt: list[int], count: int
) -> tuple[list[int], torch.Tensor]:
    scores = Scores(model)
    settings = SamplingSettings(temperature=0, max_tokens=count)
    answer = Generation(model, cached, prompt, settings, context=CONTEXT, ends=frozenset())
    while answer.finish is None:
        answer.advance()
    return answer.tokens[len(prompt) :], scores.last(count)


@pytest.mark.parametrize("move", [False, True])
def test_behind_any_chunk_the_scores_are_the_same(model: Any, move: bool) -> None:
    prompt = drawn(8 * CHUNK + 5)
    form = form_of_model(model)
    assert form is not None
    _, tokens, scores = alone(model, prompt, ANSWER)
    chunks = cut(model, prompt)
    assert len(chunks) == 8 and all(one.has_ends for one in chunks)
    for count in (1, 3, 8):
        cached = CachedTokens(model, CHUNK)
        given = [copied(one) for one in chunks[:count]]
        cached.start_behind(given, prompt, form, move=move)
        assert cached.held == prompt[: count * CHUNK] and cached.whole == count * CHUNK
        assert cached.form == form
        if move:
            assert all(layer is None for one in given for layer in one.layers)
        found = generated(model, cached, prompt, ANSWER)
        assert found[0] == tokens
        assert torch.equal(found[1], scores)
        if not move:  # whoever has the chunks still has them as they were
            again = [layer for one in given for layer in one.layers]
            wanted = [layer for one in chunks[:count] for layer in one.layers]
            assert all(
                torch.equal(a, b)
                for one, other in zip(again, wanted, strict=True)
                for a, b in zip(one or (), other or (), strict=True)
            )


def test_a_chunk_can_be_cut_while_the_answer_goes_on(model: Any) -> None:
    prompt = drawn(4 * CHUNK + 1, seed=1)
    form = form_of_model(model)
    assert form is not None
    cached = CachedTokens(model, CHUNK)
    cached.may_keep_ends = lambda: True
    generated(model, cached, prompt, 30)
    other = prompt[: 3 * CHUNK] + drawn(9, seed=2)
    assert cached.reusable(other) == 3 * CHUNK
    _, tokens, scores = alone(model, other, 20)
    fresh = CachedTokens(model, CHUNK)
    fresh.start_behind([cached.chunk_at(i) for i in range(3)], other, form, move=False)
    found = generated(model, fresh, other, 20)
    assert found[0] == tokens and torch.equal(found[1], scores)


def test_a_cache_that_has_moved_on_stands_at_a_kept_end_again(model: Any) -> None:
    prompt = drawn(9 * CHUNK + 1, seed=3)
    cached = CachedTokens(model, CHUNK)
    cached.may_keep_ends = lambda: True
    generated(model, cached, prompt, 40)
    for count in (8, 5, 1):
        other = prompt[: count * CHUNK] + drawn(CHUNK + 3, seed=count)
        cached.rewind(other)
        assert len(cached.held) == count * CHUNK
        _, tokens, scores = alone(model, other, 12)
        found = generated(model, cached, other, 12)
        assert found[0] == tokens and torch.equal(found[1], scores)


def test_without_its_end_it_starts_over(model: Any) -> None:
    prompt = drawn(9 * CHUNK + 1, seed=4)
    cached = CachedTokens(model, CHUNK)
    generated(model, cached, prompt, 40)
    assert cached.ends_bytes == 0
    form = form_of_model(model)
    assert form is not None
    other = [*prompt[: 8 * CHUNK], 5, 6, 7]
    expected = 0 if moves(form) else 8 * CHUNK
    assert cached.reusable(other) == expected
    cached.rewind(other)
    assert len(cached.held) == expected
    _, tokens, scores = alone(model, other, 5)
    found = generated(model, cached, other, 5)
    assert found[0] == tokens and torch.equal(found[1], scores)


def test_the_next_turn_of_a_chat_begins_with_the_last_one(model: Any) -> None:
    """Also where a window has moved on over the answer, and where there is a state."""
    session = ChatSession(model, None)
    said = drawn(5 * CHUNK + 2, seed=5)
    for more in (CHUNK + 1, 3, 2 * CHUNK):
        _, tokens, scores = alone(model, said, 20)
        found = turn(session, said, 20)
        assert found[1] == tokens and torch.equal(found[2], scores)
        before, said = said, said + tokens + drawn(more, seed=more)
        assert session._cached.reusable(said) == len(before) // CHUNK * CHUNK


def test_what_keeps_a_cache_of_its_own_has_no_form(tmp_path: Path) -> None:
    plain = tiny_model("minimax", max_position_embeddings=1024)
    write_package(plain, tmp_path, identity(plain), prefill_chunk=CHUNK)
    model: Any = load_package(tmp_path, context=CONTEXT)
    seen: list[int] = []
    cached = CachedTokens(model, CHUNK)
    cached.on_chunk = lambda tokens, chunk: seen.append(len(tokens))
    prompt = drawn(4 * CHUNK + 1)
    generated(model, cached, prompt, 3)
    assert cached.form is None and not seen
    assert cached.reusable(prompt) == 0
    model.conmoe.close()


def test_where_a_cache_can_stand() -> None:
    rows, state = LayerForm("rows"), LayerForm("state")
    form: Form = (rows, LayerForm("window", 33), state)
    assert [ends_needed(form, size) for size in (16, 32, 64)] == [2, 1, 1]
    assert ends_needed((rows,), 16) == 0

    def at(*ends: bool) -> int:
        return standing_at([HeldChunk([], one) for one in ends], form, 16)

    assert at(True, True, True) == 3
    assert at(True, True, False) == 2
    assert at(False, True, True) == 3
    assert at(False, True) == at(False) == at() == 0
    assert at(True, False, True) == 1
    assert standing_at([HeldChunk([], False)] * 3, (rows,), 16) == 3


def test_the_width_of_a_row_follows_from_its_bytes() -> None:
    assert [width_of_row(row_bytes(width)) for width in range(1, 600)] == list(range(1, 600))
