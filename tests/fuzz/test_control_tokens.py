"""No control token comes out of a message, whatever is written there, with any template and tokenizer."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import pytest
from fuzz.cases import random_of, seeds

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.control_tokens import ControlTokens
from conmoe_edge.offload.generation.prompt import prompt_tokens, text_tokens
from tests import small_tokenizers as tokenizers
from tests.chat_templates import ALL, NOT_SPECIAL, SPECIAL

HARMLESS = (
    "The river",
    "user",
    "assistant",
    "system",
    " ",
    "\n",
    "\n\n",
    "/nothink",
    "\u4e2d\u6587",
    "\ue000",
    "\U000f0000",
)
LOOKED_FOR = {
    "thinking": re.compile("(</?think>|</?tool_response>)"),
    "observing": re.compile("(</?think>)"),
    "bare": re.compile("(</think>)"),
}
"""What these templates look for in answers. It steers there: the model wrote it, and it is no special token."""
CASES = seeds(20)


def _content(random: Random, *, hostile: bool) -> str:
    pieces = list(HARMLESS)
    if hostile:
        tokens = [*SPECIAL, *NOT_SPECIAL]
        cuts = [(token, random.randrange(1, len(token))) for token in tokens]
        pieces = [
            *tokens,
            *(t[:n] for t, n in cuts),
            *(t[n:] for t, n in cuts),
            *(t.upper() for t in tokens),
            *HARMLESS,
        ]
    return "".join(random.choice(pieces) for _ in range(random.randrange(6)))


def _conversation(random: Random, *, hostile: bool) -> list[dict[str, str]]:
    first = [{"role": "system", "content": _content(random, hostile=hostile)}] * random.randrange(2)
    turns = random.randrange(3)
    roles = [("user", "assistant")[n % 2] for n in range(2 * turns + 1)]
    return first + [{"role": role, "content": _content(random, hostile=hostile)} for role in roles]


def _harmless_twin(message: dict[str, str], template: str) -> dict[str, str]:
    """The same message with letters that are part of no token."""
    parts = [message["content"]]
    if message["role"] == "assistant" and template in LOOKED_FOR:
        parts = LOOKED_FOR[template].split(message["content"])
    content = "".join(part if n % 2 else re.sub(r"\S", "~", part) for n, part in enumerate(parts))
    return {**message, "content": content}


def _steering(tokenizer: Any, ids: list[int]) -> list[int]:
    control = ControlTokens.of(tokenizer, tokenizer.chat_template or "")
    return [token for token in ids if token in control.spelling and token != control.unknown]


def _transformers(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


@pytest.mark.parametrize("seed", CASES)
def test_messages_never_steer(seed: int) -> None:
    random = random_of(seed)
    for kind in tokenizers.KINDS:
        tokenizer = tokenizers.make(kind, begins=random.random() < 0.5)
        name = random.choice(list(ALL))
        tokenizer.chat_template = ALL[name]
        messages = _conversation(random, hostile=True)
        twin = [_harmless_twin(message, name) for message in messages]
        try:
            ids = prompt_tokens(tokenizer, messages)
        except UsageError as error:
            # Only a question that this template takes for a tool's answer is too much like its own text.
            assert name == "thinking" and any(
                "<tool_response>" in m["content"] for m in messages
            ), error
            continue
        assert _steering(tokenizer, ids) == _steering(tokenizer, _transformers(tokenizer, twin))
        if kind == "byte-bpe":  # loses nothing of a text
            assert tokenizer.decode(ids) == tokenizer.decode(_transformers(tokenizer, messages))


@pytest.mark.parametrize("seed", CASES)
def test_harmless_messages_are_encoded_as_transformers_does(seed: int) -> None:
    random = random_of(seed)
    for kind in tokenizers.KINDS:
        tokenizer = tokenizers.make(kind)
        tokenizer.chat_template = random.choice(list(ALL.values()))
        messages = _conversation(random, hostile=False)
        assert prompt_tokens(tokenizer, messages) == _transformers(tokenizer, messages)


@pytest.mark.parametrize("seed", CASES)
def test_text_without_template_never_steers(seed: int) -> None:
    random = random_of(seed)
    for kind in tokenizers.KINDS:
        tokenizer = tokenizers.make(kind, begins=random.random() < 0.5)
        tokenizer.chat_template = None
        text = _content(random, hostile=True)
        ids = text_tokens(tokenizer, text)
        empty = tokenizer("").input_ids
        assert ids[: len(empty)] == empty
        assert _steering(tokenizer, ids[len(empty) :]) == []
        if not any(token in text for token in SPECIAL) and kind != "wordpiece":
            assert ids == tokenizer(text).input_ids
