"""Tokens to text while they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.offload.generation.detokenize import TextStream

DEMO = Path(__file__).parents[3] / "conmoe_edge" / "data" / "demo"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


def _stream(tokenizer: Any, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.add(token) for token in tokens), stream.finish()]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_pieces_are_the_whole_text(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    pieces = _stream(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(st.integers(6, 4000), max_size=40))
def test_any_tokens_even_broken_characters(tokenizer: Any, tokens: list[int]) -> None:
    pieces = _stream(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_a_character_of_several_tokens_comes_in_one_piece(tokenizer: Any) -> None:
    text = "a 🦉 b"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokens) > len(text), "the owl is no single token"
    pieces = [piece for piece in _stream(tokenizer, tokens) if piece]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_certain(tokenizer: Any) -> None:
    tokens = tokenizer("one two three", add_special_tokens=False).input_ids
    stream = TextStream(tokenizer)
    assert all(stream.add(token) for token in tokens)
    assert stream.finish() == ""
