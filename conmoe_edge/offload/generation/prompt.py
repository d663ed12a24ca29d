"""Messages to tokens, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conmoe_edge.errors import UsageError


def prompt_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The prompt: the chat template's, or the last message alone for a model without one.

    Raises:
        UsageError: there is no message, or the template refuses them.
    """
    if not messages:
        raise UsageError("There is no message to answer.")
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(messages[-1]["content"]).input_ids)
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            return_dict=True,
        )
    except TemplateError as error:
        raise UsageError(
            "The model's chat template refuses these messages.", str(error)[:200]
        ) from error
    return list(encoded["input_ids"])


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer, by the model's generation config and its tokenizer."""
    ends = model.generation_config.eos_token_id
    found = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    found.add(tokenizer.eos_token_id)
    return frozenset(token for token in found if token is not None)
