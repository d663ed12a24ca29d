"""``/v1/responses`` and ``/v1/messages``, asked by the two official clients."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.serve.conftest import KEY, NAME, Running
from tests.serve.test_tools_served import TOOL

FUNCTION = TOOL["function"]
OF_RESPONSES: dict[str, Any] = {"type": "function", **FUNCTION}
OF_MESSAGES: dict[str, Any] = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}
QUESTION: list[Any] = [{"role": "user", "content": "How long is the Rhine?"}]


def text_of(client: openai.OpenAI, messages: list[Any], tokens: int) -> str:
    more: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": tokens}
    return (
        client.chat.completions.create(messages=messages, **more).choices[0].message.content or ""
    )


# Responses


def respond(client: openai.OpenAI, **more: Any) -> Any:
    plain = {"model": NAME, "temperature": 0, "max_output_tokens": 20, "input": QUESTION}
    return client.responses.create(**{**plain, **more})


def test_responses_say_what_chat_says(client: openai.OpenAI) -> None:
    expected = text_of(client, [{"role": "system", "content": "Be short."}, *QUESTION], 20)
    reply = respond(client, instructions="Be short.")
    assert reply.output_text == expected
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.usage.output_tokens == 20 and reply.usage.input_tokens > 10
    parts = [{"type": "input_text", "text": "How long is the Rhine?"}]
    same = [{"role": "user", "content": parts}]
    for given in ("How long is the Rhine?", same):
        assert respond(client, instructions="Be short.", input=given).output_text == expected
    events = list(respond(client, instructions="Be short.", stream=True))
    assert [one.sequence_number for one in events] == list(range(len(events)))
    kinds = [one.type for one in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    said = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert said == expected == events[-1].response.output_text


def test_responses_call_tools_and_go_on(client: openai.OpenAI) -> None:
    wish: dict[str, Any] = {
        "tools": [OF_RESPONSES],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 200,
    }
    reply = respond(client, **wish)
    (call,) = reply.output
    assert (call.type, call.name, reply.status) == ("function_call", "river_length", "completed")
    assert json.loads(call.arguments)["river"] in ("Rhine", "Aare")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "1233 km"}
    turns = [*QUESTION, call.model_dump(), result]
    named = {"type": "function", "name": "river_length"}
    for choice in ("auto", named):
        assert respond(client, **{**wish, "input": turns, "tool_choice": choice}).usage
    with client.responses.stream(model=NAME, temperature=0, input=QUESTION, **wish) as stream:
        kinds = [one.type for one in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds and kinds[-1] == "response.completed"
    assert final.output[0].type == "function_call"
    assert final.output[0].arguments == call.arguments


def test_responses_of_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "x", "strict": True, "schema": schema}
    reply = respond(client, text={"format": form}, max_output_tokens=60)
    assert json.loads(reply.output_text)["a"] in (True, False)


def test_responses_go_on_behind_a_tool_that_took_a_text(client: openai.OpenAI) -> None:
    """As of a conversation that another model has begun."""
    call = {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** x"}
    result = {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"}
    longer = respond(client, input=[*QUESTION, call, result], max_output_tokens=1).usage
    assert longer.input_tokens > respond(client, max_output_tokens=1).usage.input_tokens + 20


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"previous_response_id": "resp_1"}, "stores nothing"),
        ({"background": True}, "stores nothing"),
        ({"background": 0}, "stores nothing"),  # is no false
        ({"tools": {"type": "function"}}, "tools: a list"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": []}, "input is missing"),
    ],
)
def test_responses_refuse(client: openai.OpenAI, more: dict[str, Any], text: str) -> None:
    with pytest.raises(openai.BadRequestError, match=text):
        respond(client, **more)


def test_tools_of_other_servers_are_left_out_and_named(client: openai.OpenAI) -> None:
    raw = client.responses.with_raw_response.create(
        model=NAME, input="x", max_output_tokens=1, tools=[{"type": "web_search"}]
    )
    assert raw.headers["x-conmoe-ignored"] == "tools[0] (web_search)"


# Messages

GREEDY = {"temperature": 0}
"""The client has no argument for it, the interface has."""


@pytest.fixture(scope="module")
def claude(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def message(client: anthropic.Anthropic, **more: Any) -> Any:
    plain = {"model": NAME, "max_tokens": 20, "messages": QUESTION, "extra_body": GREEDY}
    return client.messages.create(**{**plain, **more})


def test_messages_say_what_chat_says(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    expected = text_of(client, [{"role": "system", "content": "Be short."}, *QUESTION], 20)
    blocks: Any = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    for system in ("Be short.", blocks):
        reply = message(claude, system=system)
        assert [(one.type, one.text) for one in reply.content] == [("text", expected)]
        assert (reply.stop_reason, reply.usage.output_tokens) == ("max_tokens", 20)
    plain: dict[str, Any] = {"model": NAME, "messages": QUESTION, "extra_body": GREEDY}
    with claude.messages.stream(max_tokens=20, system="Be short.", **plain) as stream:
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 20
    counted = claude.messages.count_tokens(model=NAME, messages=QUESTION, system="Be short.")
    usage = final.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    word = expected.split()[3]
    stopped = message(claude, system="Be short.", stop_sequences=[word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert stopped.content[0].text == expected[: expected.index(word)]


def test_messages_call_tools_and_go_on(claude: anthropic.Anthropic) -> None:
    wish: dict[str, Any] = {
        "tools": [OF_MESSAGES],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 200,
    }
    reply = message(claude, **wish)
    (call,) = reply.content
    assert (call.type, call.name, reply.stop_reason) == ("tool_use", "river_length", "tool_use")
    assert call.input["river"] in ("Rhine", "Aare")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "1233 km"}
    more = {"type": "text", "text": "And in miles?"}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": [one.model_dump() for one in reply.content]},
        {"role": "user", "content": [result, more]},
    ]
    for choice in ({"type": "auto"}, {"type": "none"}, {"type": "tool", "name": "river_length"}):
        assert message(claude, **{**wish, "messages": turns, "tool_choice": choice}).content
    plain: dict[str, Any] = {"model": NAME, "messages": QUESTION, "extra_body": GREEDY}
    with claude.messages.stream(**plain, **wish) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use" and final.content[0].type == "tool_use"
    assert final.content[0].input == call.input


def test_a_picture_that_a_tool_gave_is_said_and_does_not_end_the_conversation(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    use = {"type": "tool_use", "id": "t1", "name": "read", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [picture]}
    turns: Any = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    asked: Any = {"model": NAME, "max_tokens": 1, "messages": [*QUESTION, *turns]}
    reply = claude.messages.with_raw_response.create(**asked)
    assert reply.headers["x-conmoe-ignored"] == "messages[2].content[0].content[0] (image)"
    call = {"type": "function_call", "call_id": "c1", "name": "view", "arguments": "{}"}
    output = [{"type": "input_text", "text": "A tree."}, {"type": "input_image", "image_url": "x"}]
    seen = {"type": "function_call_output", "call_id": "c1", "output": output}
    items: Any = [*QUESTION, call, seen]
    raw = client.responses.with_raw_response.create(model=NAME, input=items, max_output_tokens=1)
    assert raw.headers["x-conmoe-ignored"] == "input[2].output[1] (input_image)"
    with pytest.raises(openai.BadRequestError, match="only text"):
        respond(client, input=[*QUESTION, call, {**seen, "output": 7}])


def test_messages_of_a_schema(claude: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wish = {"format": {"type": "json_schema", "schema": schema}, "effort": "high"}
    reply = message(claude, max_tokens=60, extra_body={**GREEDY, "output_config": wish})
    assert json.loads(reply.content[0].text)["a"] in (True, False)
    for wrong in ("json", {"format": {"type": "xml"}}, {"effort": "endless"}):
        with pytest.raises(anthropic.BadRequestError, match=r"output_config|reasoning_effort"):
            message(claude, extra_body={"output_config": wrong})


def test_messages_refuse_in_their_own_form(claude: anthropic.Anthropic, strict: Running) -> None:
    picture = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match="only text"):
        message(claude, messages=picture)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        message(claude, extra_body={"temperature": 9})
    locked = anthropic.Anthropic(base_url=strict.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as refused:
        message(locked)
    body: Any = refused.value.body
    assert body["type"] == "error" and body["error"]["type"] == "authentication_error"
    with_key = anthropic.Anthropic(base_url=strict.url, api_key=KEY, max_retries=0)
    assert message(with_key, max_tokens=1).content
    with pytest.raises(anthropic.NotFoundError):
        message(with_key, model="claude-opus")
    missing = httpx.post(
        f"{strict.url}/v1/messages", json={"model": NAME}, headers={"x-api-key": KEY}
    )
    assert missing.status_code == 400 and missing.json()["error"]["type"] == "invalid_request_error"
