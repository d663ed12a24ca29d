"""Several threads on one model: each gets what it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.errors import InUse
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.session import ChatSession
from tests.families import tiny_model
from tests.hand_packages import thirds, write_package
from tests.patience import PATIENCE

DEMO = Path(__file__).parents[3] / "conmoe_edge" / "data" / "demo"
PROMPTS = ([5, 9, 33, 12], [60, 61, 7, 8, 20], [40, 41])
GREEDY = SamplingSettings(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    plain = tiny_model("olmoe", vocab_size=4096, max_position_embeddings=512, eos_token_id=5)
    folder = write_package(plain, tmp_path_factory.mktemp("package"), thirds(plain))
    return load_package(folder, slots=(4,), context=400)  # fewer than there are: slots change hands


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each gives, all begun at the same moment in threads of their own."""
    start = threading.Barrier(len(calls))

    def call(one: Callable[[], Any]) -> Any:
        start.wait(PATIENCE)
        return one()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(call, one) for one in calls]]


def generated(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return out[0].tolist()


def scores(model: Any, prompt: list[int]) -> list[float]:
    with torch.no_grad():
        for _ in range(20):
            out = model(torch.tensor([prompt])).logits[0, -1]
    return out.tolist()


@pytest.mark.parametrize("call", [generated, scores])
def test_three_threads_get_what_each_gets_alone(model: Any, call: Callable[..., Any]) -> None:
    alone = [call(model, prompt) for prompt in PROMPTS]
    assert len({str(one) for one in alone}) == 3
    jobs = [lambda prompt=prompt: call(model, prompt) for prompt in PROMPTS]
    for _ in range(3):
        assert together(jobs) == alone


def test_three_conversations_in_three_threads(model: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)

    def ask(text: str) -> str:
        message = [{"role": "user", "content": text}]
        return "".join(ChatSession(model, tokenizer).reply(message, GREEDY))

    texts = ("Tell me about the sea.", "What is a river?", "Name a bird.")
    alone = [ask(text) for text in texts]
    assert together([lambda text=text: ask(text) for text in texts]) == alone


def test_one_conversation_gives_one_answer_at_a_time(model: Any) -> None:
    from transformers import AutoTokenizer

    session = ChatSession(model, AutoTokenizer.from_pretrained(DEMO))
    message = [{"role": "user", "content": "Tell me about the sea."}]
    whole = "".join(session.reply(message, GREEDY))
    first = session.reply(message, GREEDY)
    piece = next(first)
    with pytest.raises(InUse, match="giving another answer"):
        next(session.reply(message, GREEDY))
    assert piece + "".join(first) == whole  # the refused one has changed nothing
    abandoned = session.reply(message, GREEDY)
    next(abandoned)
    abandoned.close()
    assert "".join(session.reply(message, GREEDY)) == whole


def test_an_interrupt_leaves_the_model_to_others(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes in the middle of a forward."""
    calls = []

    def interrupt(*_args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    hook = model.get_submodule("model.layers.1").register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            scores(model, PROMPTS[0])
        assert together([lambda: scores(model, PROMPTS[0])])
    finally:
        hook.remove()
