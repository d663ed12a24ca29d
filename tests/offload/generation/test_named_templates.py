"""A tokenizer with several chat templates: the one that is named, the default, or an error that lists them."""

from __future__ import annotations

from typing import Any

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.named_templates import choose_template, templates_of
from conmoe_edge.offload.generation.prompt import prompt_tokens
from tests import small_tokenizers
from tests.chat_templates import CHATML, PLAIN

MESSAGES = [{"role": "user", "content": "The river runs."}]


@pytest.fixture
def tokenizer() -> Any:
    return small_tokenizers.make("byte-bpe")


def prompt(tokenizer: Any) -> list[int]:
    return prompt_tokens(tokenizer, MESSAGES)


@pytest.mark.parametrize("others", [{"default": PLAIN}, {"tool_use": PLAIN}])
def test_the_named_one_is_used(others: dict[str, str], tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    wanted = prompt(tokenizer)
    tokenizer.chat_template = {"rag": CHATML, **others}
    choose_template(tokenizer, "rag")
    assert prompt(tokenizer) == wanted
    choose_template(tokenizer, "default")  # what is left is the only one


@pytest.mark.parametrize(
    ("templates", "has"),
    [
        ({"rag": CHATML, "tool_use": PLAIN}, "rag, tool_use"),
        (CHATML, "default"),
    ],
)
def test_an_unknown_name_lists_those_that_there_are(
    templates: Any, has: str, tokenizer: Any
) -> None:
    tokenizer.chat_template = templates
    with pytest.raises(UsageError, match="no chat template 'tool'") as error:
        choose_template(tokenizer, "tool")
    assert error.value.why == f"the model has: {has}"
    assert error.value.fix == f"--template {has.split(',')[0]}"
    choose_template(tokenizer, error.value.fix.split()[1])
    assert prompt(tokenizer)


def test_a_model_without_any(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert templates_of(tokenizer) == {}
    with pytest.raises(UsageError) as error:
        choose_template(tokenizer, "default")
    assert "without --template" in error.value.fix


def test_several_without_a_default_name_the_way_out(tokenizer: Any) -> None:
    tokenizer.chat_template = {"tool_use": PLAIN, "rag": CHATML}
    with pytest.raises(UsageError, match="several") as error:
        prompt(tokenizer)
    assert "rag, tool_use" in error.value.why
    assert "--template rag" in error.value.fix


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_text_stands_before_a_question_without_a_template(role: str, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    asked = prompt_tokens(tokenizer, [{"role": role, "content": "Be short."}, *MESSAGES])
    assert "Be short.\n\nThe river runs." in tokenizer.decode(asked)
