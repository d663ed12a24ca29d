"""The prompt of a conversation that may have tools and reasoning, and how its answer is to be read.

Whether a chat template takes tools is found by giving it one: a template that takes them writes its name. Where it
takes none, or writes calls in no known form, tools go into the text (``generic_tools.py``).
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conmoe_edge.offload.generation.answer_form import AnswerForm, answer_form
from conmoe_edge.offload.generation.chat_template import shared
from conmoe_edge.offload.generation.generic_tools import tools_as_text
from conmoe_edge.offload.generation.message_order import in_order
from conmoe_edge.offload.generation.named_templates import default_template
from conmoe_edge.offload.generation.prompt import prompt_tokens, template_variables
from conmoe_edge.offload.generation.tool_forms import TAGGED, Tools, form_of

_PROBE = "probe_5b1f07"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": "x",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
}


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Tokens of a prompt, and the form of its answer.

    ``reordered``: whether the chat template was given other messages than came, see ``message_order.py``.
    """

    tokens: list[int]
    form: AnswerForm
    reordered: bool = False


def chat_prompt(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Tools = (),
    template_kwargs: Mapping[str, Any] | None = None,
    allow_special_tokens: bool = False,
    stop_event: threading.Event | None = None,
    check: Callable[[str], None] | None = None,
) -> ChatPrompt:
    """As ``prompt_tokens``, for messages that may have ``tool_calls`` and the role ``tool``, in any order of roles.

    Args:
        tools: that the answer may call.
        template_kwargs: further variables of the template, such as ``enable_thinking``.

    Raises:
        UsageError: as ``prompt_tokens``.
    """
    template = default_template(tokenizer)
    calls, generic = None, False
    about_tools = tools or any(
        one.get("tool_calls") or one.get("role") == "tool" for one in messages
    )
    if about_tools:
        known = form_of(template) if takes_tools(tokenizer, template) else None
        generic = known is None
        calls = (known or TAGGED) if tools else None
        if generic:
            messages = tools_as_text(messages, tools)
    ordered = in_order(messages, template, template_variables(tokenizer))
    variables = dict(template_kwargs or {})
    if tools and not generic:
        variables["tools"] = list(tools)
    tokens = prompt_tokens(
        tokenizer,
        ordered,
        allow_special_tokens=allow_special_tokens,
        stop_event=stop_event,
        check=check,
        variables=variables,
    )
    form = answer_form(tokenizer, template, tokens, calls, generic=generic)
    return ChatPrompt(tokens, form, reordered=ordered != list(messages))


def takes_tools(tokenizer: Any, template: str) -> bool:
    """Whether a chat template writes the tools that it is given."""
    return bool(template) and _takes_tools(template, json.dumps(template_variables(tokenizer)))


@functools.lru_cache(maxsize=8)
def _takes_tools(template: str, variables: str) -> bool:
    given = {**json.loads(variables), "tools": [_PROBE_TOOL]}
    text = shared.taken(template, [{"role": "user", "content": "x"}], given)
    return _PROBE in (text or "")
