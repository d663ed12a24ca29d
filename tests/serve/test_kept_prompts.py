"""Prompts kept for a next request: shared by those that begin the same, by use, and never beyond the room."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from fuzz.cases import random_of, seeds
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from conmoe_edge.integrations.load import load_package
from conmoe_edge.memory.budget import Budget
from conmoe_edge.offload.generation.answer import Answer
from conmoe_edge.offload.generation.cache_room import Room
from conmoe_edge.offload.generation.prefix_chunks import HeldChunk, LayerForm
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.sequence import CachedTokens, reusable
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.jobs import Done, Event, Job, Loaded, Piece
from conmoe_edge.serve.kept_prompts import KeptPrompts
from conmoe_edge.serve.prometheus import Metrics
from tests.families import VOCAB, save_tokenizer, tiny_model
from tests.hand_packages import identity, write_package
from tests.patience import PATIENCE

CHUNK, CONTEXT = 16, 700
CASES = [
    ("olmoe", {}, "source"),
    ("gpt_oss", {"sliding_window": 40}, "int8"),
    ("afmoe", {"sliding_window": 20}, "source"),
    ("qwen3_next", {}, "source"),
]


def test_only_whole_chunks_are_used_again_and_one_token_is_left() -> None:
    held = list(range(10))
    assert reusable(held, list(range(10)), 4) == 8
    assert reusable(held, list(range(8)), 4) == 4
    assert reusable(held, [0, 1, 2, 3, 4, 9, 9], 4) == 4
    assert reusable(held, [5, 6], 4) == 0


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    family, more, kept = request.param
    plain = tiny_model(family, dtype=torch.bfloat16, max_position_embeddings=1024, **more)
    made = tmp_path_factory.mktemp("package")
    write_package(plain, made, identity(plain), prefill_chunk=CHUNK)
    save_tokenizer(made)
    return made, kept


class Asked:
    """An engine, and a watch over what it holds of its room."""

    def __init__(self, folder: tuple[Path, str], parallel: int = 4) -> None:
        from transformers import AutoTokenizer

        budget = Budget("cpu", 4 << 30, "4GiB", "test", host_bytes=0)
        self.model, self.other = (
            load_package(folder[0], budget=budget, context=CONTEXT, kv_precision=folder[1])
            for _ in range(2)
        )
        tokenizer = AutoTokenizer.from_pretrained(folder[0])
        self.ended: queue.Queue[BaseException | None] = queue.Queue()
        self.engine = Engine(
            lambda: Loaded(self.model, tokenizer),
            parallel=parallel,
            queue=64,
            metrics=Metrics(),
            on_end=self.ended.put,
        )
        self.most = 0
        self.engine.start()
        while self.engine.loaded is None:
            pass
        self.kept = self.engine._kept
        take = self.engine._take

        def watched(jobs: Any, turn: Any) -> None:
            take(jobs, turn)
            self.most = max(self.most, self.held_bytes())

        self.engine._take = watched

    def has(self, kind: str) -> bool:
        """Whether some layers keep tokens so."""
        return any(one.kind == kind for one in self.engine._form or ())

    def held_bytes(self) -> int:
        """Of the memory behind all that answers and kept prompts hold, what is shared once."""
        held: dict[int, int] = {}
        running = [one.answer.cached for one in self.engine._begun if one.answer is not None]
        kept = [one.chunk for one in self.kept._nodes()]
        found = [one.ends for one in running]
        tensors = [*_tensors([one._cache.layers for one in running if one._cache is not None])]
        tensors += _tensors([one.layers for one in kept])
        tensors += _tensors([ends.layers for row in found for ends in row if ends is not None])
        for one in tensors:
            if one.numel() > 1:
                held[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        return sum(held.values())

    def ask(self, prompt: list[int], count: int) -> queue.Queue[Event]:
        told: queue.Queue[Event] = queue.Queue()
        settings = SamplingSettings(temperature=0, max_tokens=count)
        self.engine.submit(Job(tuple(prompt), settings, "", told.put))
        return told

    def stop(self) -> None:
        self.engine.stop()
        assert self.ended.get(timeout=PATIENCE) is None
        assert self.kept.nbytes == 0 and self.engine._room.used == 0
        runtime: Any = self.other.conmoe
        runtime.close()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [one for row in value for one in _tensors(row)]
    return (
        _tensors(vars(value))
        if isinstance(value, CacheLayerMixin | LinearAttentionCacheLayerMixin)
        else []
    )


def answer(told: queue.Queue[Event]) -> tuple[str, int]:
    """Its text, and how many tokens of its prompt were known."""
    text = ""
    while isinstance(event := told.get(timeout=PATIENCE), Piece):
        text += event.text
    assert isinstance(event, Done), event
    return text, event.usage.cached


@pytest.fixture
def asked(folder: tuple[Path, str]) -> Iterator[Asked]:
    one = Asked(folder)
    yield one
    one.stop()


def drawn(count: int, seed: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(3, VOCAB) for _ in range(count)]


def text(asked: Asked, prompt: list[int], count: int) -> str:
    """What it is alone, on a model of its own."""
    settings = SamplingSettings(temperature=0, max_tokens=count)
    loaded = asked.engine.loaded
    assert loaded is not None
    one = Answer(
        asked.other,
        loaded.tokenizer,
        CachedTokens(asked.other, CHUNK),
        prompt,
        settings,
        context=CONTEXT,
        ends=asked.engine._ends,
    )
    said = ""
    while one.finish is None:
        said += one.step()
    return said


def test_a_system_prompt_is_kept_for_all_who_begin_with_it(asked: Asked) -> None:
    system = drawn(4 * CHUNK + 3, 1)
    questions = [system + drawn(CHUNK + n, 10 + n) for n in range(3)]
    wanted = [text(asked, one, 12) for one in questions]
    known = [answer(asked.ask(one, 12)) for one in questions]
    assert [one[0] for one in known] == wanted
    # A state is kept where prompts part, and that shows with the second one.
    parted = 0 if asked.has("state") else 4 * CHUNK
    assert [one[1] for one in known] == [0, parted, 4 * CHUNK]
    again = [answer(asked.ask(one, 12)) for one in questions]  # none took it away from the others
    assert [one[0] for one in again] == wanted
    assert [one[1] for one in again] == [(len(one) - 1) // CHUNK * CHUNK for one in questions]
    assert len(asked.kept) == 3 and asked.kept.chunks == 4 + 3
    assert asked.kept.hits + asked.kept.misses == 6
    assert asked.kept.misses == (2 if asked.has("state") else 1)


def test_two_at_once_share_it_while_the_first_one_runs(asked: Asked) -> None:
    system = drawn(6 * CHUNK, 2)
    first, second = system + drawn(5, 3), system + drawn(7, 4)
    wanted = text(asked, first, 150), text(asked, second, 12)
    running = asked.ask(first, 150)
    pieces = [running.get(timeout=PATIENCE)]  # its prompt is in
    assert isinstance(pieces[0], Piece)
    found, known = answer(asked.ask(second, 12))
    assert (found, known) == (wanted[1], 6 * CHUNK)
    rest, _ = answer(running)
    assert pieces[0].text + rest == wanted[0]


def test_nobody_waits_for_what_is_kept_and_it_goes_by_use(asked: Asked) -> None:
    prompts = [drawn(180, seed) for seed in range(6)]
    used: list[int] = []
    for number in (0, 1, 2, 0, 3, 4, 2, 5):
        answer(asked.ask(prompts[number], 2))
        used = [number, *(one for one in used if one != number)]
        lengths = [len(asked.kept._path(prompts[one])) for one in used]
        whole = 180 // CHUNK
        first = next((i for i, one in enumerate(lengths) if one < whole), len(lengths))
        assert not any(lengths[first + 1 :]), "the longest unused go first"
        assert lengths[0] > 0
    assert len(asked.kept) < 6, "there is no room for all"
    answer(asked.ask(drawn(CONTEXT - 20, 9), 20))
    assert asked.most <= asked.engine._room.total


def test_a_conversation_that_fills_the_room_takes_its_prompt_and_gives_it_back(
    asked: Asked,
) -> None:
    """There is no room for a copy beside it."""
    said = drawn(400, 5)
    for _ in range(3):
        wanted = text(asked, said, CONTEXT - len(said))
        found, known = answer(asked.ask(said, CONTEXT - len(said)))
        assert found == wanted
        assert asked.most <= asked.engine._room.total
        said = said + drawn(CHUNK * 2 + 1, len(said))
    if not asked.has("window") and not asked.has("state"):
        assert known == (len(said) - 4 * CHUNK - 2) // CHUNK * CHUNK


@pytest.mark.parametrize("seed", seeds(2))
def test_any_requests_at_all(folder: tuple[Path, str], seed: int) -> None:
    """Conversations that share beginnings, at the same time, cancelled or not: their texts, and the room."""
    random = random_of(seed)
    asked = Asked(folder, parallel=random.randint(1, 5))
    systems = [drawn(random.randint(1, 90), seed * 7 + n) for n in range(3)]
    prompts: list[tuple[list[int], int]] = []
    for _ in range(14):
        base = random.choice([*systems, *(one for one, _ in prompts)])
        more = drawn(random.choice([1, CHUNK, 3 * CHUNK + 1, 100]), random.randrange(10**6))
        prompts.append(((base + more)[: CONTEXT - 80], random.choice([1, 5, 40, 60])))
    told: list[tuple[int, Any]] = []
    for i, (prompt, count) in enumerate(prompts):
        told.append((i, asked.ask(prompt, count)))
        if random.random() < 0.4:
            for j, waiting in told:
                assert answer(waiting)[0] == text(asked, *prompts[j])
            told = []
    for j, waiting in told:
        assert answer(waiting)[0] == text(asked, *prompts[j])
    assert asked.most <= asked.engine._room.total
    asked.stop()


class Standing(CachedTokens):
    """Holds chunks without a model."""

    def __init__(self, tokens: list[int]) -> None:
        self.held, self.whole, self.chunk = tokens, len(tokens) // 4 * 4, 4
        self.form = (LayerForm("rows"),)
        self.ends = []
        self.layer = [torch.arange(len(tokens)).float().view(1, 1, -1, 1)] * 2

    def chunk_at(self, index: int) -> HeldChunk:
        return HeldChunk(
            [tuple(one[..., 4 * index : 4 * index + 4, :] for one in self.layer)], True
        )

    def give_away(self) -> Any:
        layer = type("L", (), {"keys": None, "values": None, "is_initialized": True})()
        return type("C", (), {"layers": [layer]})()

    def forget(self) -> None:
        self.held = []


def test_the_tree_counts_what_it_has() -> None:
    room = Room(40, 4)
    kept = KeptPrompts(room, 4)
    kept.end(Standing(list(range(12))), 0)
    kept.end(Standing([*range(8), 20, 21, 22, 23, 24]), 0)
    assert (len(kept), kept.chunks, kept.nbytes) == (2, 4, 16)
    assert [float(one.chunk.layer(0)[0][0, 0, 0, 0]) for one in kept._path([*range(12), 0])] == [
        0,
        4,
        8,
    ]
    kept.end(Standing(list(range(100, 109))), 0)
    assert (len(kept), kept.nbytes) == (3, 24)
    path = kept._path([*range(12), 0])
    assert not kept.make_way(40, path) and kept.nbytes == 12, "all others went"
    assert kept.make_way(36, ()) and kept.nbytes == 4
    assert kept._path([*range(12), 0]) == path[:1]
    assert kept.drop_all() and not kept.drop_all() and kept.nbytes == 0


def test_a_prompt_that_is_longer_than_the_room_that_is_left_keeps_its_beginning() -> None:
    kept = KeptPrompts(Room(40, 4), 4)
    kept.end(Standing(list(range(40))), 22)
    assert kept.nbytes == 16 and len(kept._path(list(range(40)))) == 4
