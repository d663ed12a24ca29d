"""A package gives the same scores, to the bit, whatever the memory, the door and the turns before.

Each case draws a family, a precision, a map, a chunk, the format of keys and values, and a conversation. What a fresh
conversation with every prototype resident computes is compared with: later turns of a chat, ``generate``, and the
server's engine with answers that take turns; with one cache slot a layout, with some, with all; with prototypes read
ahead or not.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
import torch
from fuzz.cases import random_of, seeds

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.answer import Answer
from conmoe_edge.offload.generation.prompt import end_tokens
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.generation.session import ChatSession
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.jobs import Done, Event, Job, Loaded, Piece
from conmoe_edge.serve.prometheus import Metrics
from tests.families import VOCAB, save_tokenizer, tiny_model
from tests.hand_packages import identity, predict, thirds, write_package
from tests.patience import PATIENCE
from tests.scores import Scores, Turn, alone, turn

FAMILIES = (
    "olmoe",
    "qwen3_moe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "afmoe",
    "qwen3_next",
    "lfm2_moe",
    "minimax",
    "granitemoe",
)
CONTEXT = 400


@pytest.mark.parametrize("seed", seeds(3))
def test_the_same_scores_to_the_bit(seed: int, tmp_path: Path) -> None:
    random = random_of(seed)
    folder, tokenizer = _package(random, tmp_path)
    kept = "int8" if random.random() < 0.5 else "source"
    try:
        whole = load_package(folder, context=CONTEXT, device="cpu", kv_precision=kept)
    except UnsupportedModel:  # this family keeps something else
        kept = "source"
        whole = load_package(folder, context=CONTEXT, device="cpu")
    turns = [alone(whole, prompt, count) for prompt, count in _grown(whole, tokenizer, random)]
    _in_one_chat(whole, tokenizer, turns)
    _generated(whole, turns)
    layouts = len(whole.conmoe.manifest.layouts)
    few = tuple(random.randint(1, 4) for _ in range(layouts))
    for slots in ((1,) * layouts, few):
        model = load_package(folder, context=CONTEXT, device="cpu", slots=slots, kv_precision=kept)
        for prompt, tokens, scores in turns:
            found = alone(model, prompt, len(tokens))
            assert found[1] == tokens
            assert torch.equal(found[2], scores)
        _in_one_chat(model, tokenizer, turns)
        _generated(model, turns)
        _served(model, tokenizer, turns)


def _package(random: Random, folder: Path) -> tuple[Path, Any]:
    family = random.choice(FAMILIES)
    dtype = random.choice([torch.bfloat16, torch.bfloat16, torch.float32])
    more: dict[str, Any] = {"max_position_embeddings": 512}
    if family in ("gpt_oss", "afmoe"):
        more["sliding_window"] = random.choice([8, 64, 300])
    wide = random.random() < 0.6 and family not in ("minimax", "lfm2_moe")  # enough for 4 bits
    if wide:
        more |= {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
        if not family.startswith("deepseek"):
            more["head_dim"] = 16
    model = tiny_model(family, seed=random.randrange(100), dtype=dtype, **more)
    kind = cast(Kind, random.choice(["plain", "int8", "int4"] if wide else ["plain", "int8"]))
    ahead = random.random() < 0.4
    chunk = random.choice([1, 4, 7, 16, 32, 64, None])
    mapped = random.choice([identity, thirds])(model)
    write_package(model, folder, mapped, kind=kind, prefill_chunk=chunk)
    if ahead:
        predict(folder, depth=2, share=0.9, hidden=model.config.hidden_size)
    save_tokenizer(folder)
    from transformers import AutoTokenizer

    print(family, dtype, kind, chunk, "read ahead" if ahead else "")
    return folder, AutoTokenizer.from_pretrained(folder)


def _grown(model: Any, tokenizer: Any, random: Random) -> list[tuple[list[int], int]]:
    """The prompts of a conversation: each goes on from the answer before, or changes what was said last."""
    chunk = model.conmoe.prefill_chunk
    prompts: list[tuple[list[int], int]] = []
    said: list[int] = []
    for _ in range(random.randint(1, 4)):
        more = max(
            1, random.choice([1, 5, chunk - 1, chunk, chunk + 1, 2 * chunk]) + random.randint(-1, 1)
        )
        prompt = said + [random.randrange(3, VOCAB) for _ in range(min(more, 80))]
        if len(prompt) > CONTEXT - 20:
            break
        count = random.choice([1, 3, 12])
        prompts.append((prompt, count))
        answer = alone(model, prompt, count)[1]
        said = prompt + answer
        if random.random() < 0.25:  # asked again in other words
            said = said[: random.randrange(len(said))]
    return prompts


def _in_one_chat(model: Any, tokenizer: Any, turns: list[Turn]) -> None:
    session = ChatSession(model, tokenizer)
    for prompt, tokens, scores in turns:
        found = turn(session, prompt, len(tokens))
        assert found[1] == tokens
        assert torch.equal(found[2], scores)


def _generated(model: Any, turns: list[Turn]) -> None:
    for prompt, tokens, scores in turns:
        seen = Scores(model)
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=len(tokens),
            do_sample=False,
            eos_token_id=[],
            repetition_penalty=1.0,
        )
        assert out[0, len(prompt) :].tolist() == tokens
        assert torch.equal(seen.last(len(tokens)), scores)


def _text(model: Any, tokenizer: Any, prompt: list[int], count: int) -> str:
    settings = SamplingSettings(temperature=0, max_tokens=count)
    cached = CachedTokens(model, model.conmoe.prefill_chunk)
    ends = end_tokens(model, tokenizer)
    answer = Answer(model, tokenizer, cached, prompt, settings, context=CONTEXT, ends=ends)
    text = ""
    while answer.finish is None:
        text += answer.step()
    return text


def _served(model: Any, tokenizer: Any, turns: list[Turn]) -> None:
    """All turns at once, then one after the other, so that they begin with kept prompts."""
    wanted = [_text(model, tokenizer, prompt, len(tokens)) for prompt, tokens, _ in turns]
    ready: queue.Queue[BaseException | None] = queue.Queue()
    engine = Engine(
        lambda: Loaded(model, tokenizer), parallel=4, queue=8, metrics=Metrics(), on_end=ready.put
    )
    engine.start()
    while engine.loaded is None:
        pass

    def ask(turn: Turn) -> Callable[[], str]:
        told: queue.Queue[Event] = queue.Queue()
        settings = SamplingSettings(temperature=0, max_tokens=len(turn[1]))
        engine.submit(Job(tuple(turn[0]), settings, "", told.put))

        def text() -> str:
            said = ""
            while isinstance(event := told.get(timeout=PATIENCE), Piece):
                said += event.text
            assert isinstance(event, Done), event
            return said

        return text

    together = [ask(turn) for turn in turns]
    assert [one() for one in together] == wanted
    assert [ask(turn)() for turn in turns] == wanted
    engine.stop()
    assert ready.get(timeout=PATIENCE) is None
