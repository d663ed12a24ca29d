"""Where an answer's reasoning may stand, by what the chat template has written last."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import AddedToken

from conmoe_edge.offload.generation.answer_form import answer_form
from tests.small_tokenizers import make

TEMPLATE = "{{ messages[-1].content }}<think>{{ '</think>' }}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = copy.deepcopy(make("byte-bpe"))
    found.add_tokens([AddedToken(mark, special=False) for mark in ("<think>", "</think>")])
    return found


@pytest.mark.parametrize(
    ("written", "started", "may_begin"),
    [
        ("The river.", False, True),
        ("The river. <think>\n", True, True),
        ("The river. <think>\n\n</think>\n\n", False, False),
    ],
)
def test_reasoning_that_the_template_has_ended_does_not_begin_again(
    tokenizer: Any, written: str, started: bool, may_begin: bool
) -> None:
    """With a grammar the mark that begins it would else be the one way around what has to come."""
    form = answer_form(tokenizer, TEMPLATE, tokenizer(written, add_special_tokens=False).input_ids)
    assert form.thinking is not None
    assert form.thinking.started is started
    assert (form.thinking.begin is not None) is may_begin
