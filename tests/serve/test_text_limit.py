"""A look at a text before it is tokenised, whoever tokenises it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conmoe_edge.offload.generation.prompt import prompt_tokens
from conmoe_edge.serve.text_limit import limited

DEMO = Path(__file__).parents[2] / "conmoe_edge" / "data" / "demo"
MESSAGES = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "is wide"}]


class TooLong(Exception):
    """What the check raises."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def test_the_text_of_a_template_is_seen_whole_and_nothing_else_changes(tokenizer: Any) -> None:
    seen: list[str] = []
    one = limited(tokenizer, seen.append)
    assert prompt_tokens(one, MESSAGES) == prompt_tokens(tokenizer, MESSAGES)
    assert len(seen) == 1 and "the sea" in seen[0] and "is wide" in seen[0]
    assert one("the sea").input_ids == tokenizer("the sea").input_ids
    assert one.encode("the sea") == tokenizer.encode("the sea")
    assert seen[1] == "the sea" and "the sea" in seen[2:]
    assert one.decode([5, 6]) == tokenizer.decode([5, 6])
    assert isinstance(one, type(tokenizer))


def test_what_the_check_raises_comes_before_any_token(tokenizer: Any) -> None:
    def check(text: str) -> None:
        raise TooLong(text)

    one = limited(tokenizer, check)
    for call in (
        lambda: one("x"),
        lambda: one(["x"]),
        lambda: one.encode("x"),
        lambda: prompt_tokens(one, MESSAGES),
    ):
        with pytest.raises(TooLong):
            call()
    assert tokenizer("x").input_ids  # the tokenizer itself is as it was
