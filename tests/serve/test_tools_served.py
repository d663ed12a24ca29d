"""Tools, asked by the real client: by a model whose template knows none, and by one whose template does."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.serve.conftest import NAME

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "river_length",
        "description": "How long a river is.",
        "parameters": {
            "type": "object",
            "properties": {
                "river": {"type": "string", "enum": ["Rhine", "Aare"]},
                "unit": {"type": "string", "enum": ["km", "miles"]},
            },
            "required": ["river", "unit"],
            "additionalProperties": False,
        },
    },
}
OTHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "sea_depth", "parameters": {"type": "object", "properties": {}}},
}
QUESTION: list[Any] = [{"role": "user", "content": "How long is the Rhine?"}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 200, "messages": QUESTION}


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{**GREEDY, **more})


def check(call: Any) -> None:
    assert call.function.name == "river_length" and call.type == "function" and call.id
    given = json.loads(call.function.arguments)
    assert given["river"] in ("Rhine", "Aare") and given["unit"] in ("km", "miles")


def test_a_call_that_has_to_come(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "river_length"}}
    for choice in ("required", named):
        tools = [TOOL] if choice == "required" else [OTHER, TOOL]
        reply = ask(client, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        message = reply.choices[0].message
        assert reply.choices[0].finish_reason == "tool_calls" and message.content is None
        (call,) = message.tool_calls
        check(call)


def test_calls_are_streamed(client: openai.OpenAI) -> None:
    wish = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(client, **wish).choices[0].message.tool_calls[0].function
    chunks = list(ask(client, stream=True, **wish))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or ()]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [d.index for d in deltas] == [0] and deltas[0].id
    assert deltas[0].function and deltas[0].function.model_dump() == whole.model_dump()
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(c.choices[0].delta.content for c in chunks)
    with client.chat.completions.stream(**{**GREEDY, **wish}) as stream:
        for _ in stream:
            pass
        calls = stream.get_final_completion().choices[0].message.tool_calls
        assert calls
        check(calls[0])


def test_a_conversation_with_calls_goes_on(client: openai.OpenAI) -> None:
    wish = {"tools": [TOOL], "parallel_tool_calls": False}
    first = ask(client, tool_choice="required", **wish).choices[0].message
    call = first.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "1233 km"}
    turns = [*QUESTION, first.model_dump(exclude_none=True), result]
    answer = ask(client, messages=turns, **wish)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    assert answer.usage.prompt_tokens > ask(client, max_tokens=1, **wish).usage.prompt_tokens
    none = ask(client, messages=turns, tool_choice="none", **wish)
    assert none.usage.prompt_tokens < answer.usage.prompt_tokens


def test_tools_change_the_prompt_and_no_tools_do_not(client: openai.OpenAI) -> None:
    plain = ask(client, max_tokens=8)
    for nothing in ({"tools": []}, {"tools": [TOOL], "tool_choice": "none"}):
        reply = ask(client, max_tokens=8, **nothing)
        assert reply.choices[0].message == plain.choices[0].message
        assert reply.usage.prompt_tokens == plain.usage.prompt_tokens
    offered = ask(client, max_tokens=8, tools=[TOOL])
    assert offered.usage.prompt_tokens > plain.usage.prompt_tokens + 50


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0..type"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "cannot call tools"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
                ],
                "tool_choice": "required",
            },
            "cannot be enforced",
        ),
    ],
)
def test_what_is_refused(client: openai.OpenAI, more: dict[str, Any], text: str) -> None:
    with pytest.raises(openai.BadRequestError, match=text):
        ask(client, **more)
    control = {"type": "function", "function": {"name": "f", "description": "<|assistant|>"}}
    reply = ask(client, tools=[control], max_tokens=1)  # in the text of a message it is text
    assert reply.usage.completion_tokens == 1
