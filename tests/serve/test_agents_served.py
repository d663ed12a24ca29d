"""What coding agents really send: their requests, recorded, are answered with the events that their APIs have.

``agents/*.json`` are requests of the named version of an agent, its second one with the result of a call in it. Fields
and short words are its own; texts and ids are replaced, and only some tools are left. They go to a model whose
template takes one system message, the first, and writes calls as Qwen's do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic.types import RawMessageStreamEvent
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.patience import PATIENCE
from tests.serve.agent_model import write_package
from tests.serve.conftest import Running, serving

RECORDED = sorted((Path(__file__).parent / "agents").glob("*.json"))
WITH_TOOLS = [path for path in RECORDED if '"tools": [' in path.read_text(encoding="utf-8")]
EVENTS: dict[str, TypeAdapter[Any]] = {
    "/v1/chat/completions": TypeAdapter(ChatCompletionChunk),
    "/v1/messages": TypeAdapter(RawMessageStreamEvent),
    "/v1/responses": TypeAdapter(ResponseStreamEvent),
}


@pytest.fixture(scope="module")
def agent_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(write_package(tmp_path_factory.mktemp("agents")), "--parallel", "1") as running:
        yield running


def path_of(recorded: dict[str, Any]) -> str:
    return recorded["path"].partition("?")[0]


def asked(running: Running, recorded: dict[str, Any], body: dict[str, Any]) -> httpx.Response:
    headers = {**recorded["headers"], "authorization": "Bearer none"}
    reply = httpx.post(running.url + recorded["path"], json=body, headers=headers, timeout=PATIENCE)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    return reply


def events(reply: httpx.Response, path: str) -> list[Any]:
    """Each event as the official client reads it."""
    data = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    if path == "/v1/chat/completions":
        assert data.pop() == "[DONE]"
    return [EVENTS[path].validate_json(one) for one in data]


def check_whole(found: list[Any], path: str) -> None:
    """It begins and ends as its API wants it, and nothing in it failed."""
    if path == "/v1/chat/completions":
        assert found[0].choices[0].delta.role == "assistant"
        finished = [one.choices[0].finish_reason for one in found if one.choices]
        assert finished[-1] in ("stop", "length", "tool_calls") and not any(finished[:-1])
        assert found[-1].usage.prompt_tokens > 50 and not found[-1].choices
        return
    kinds = [one.type for one in found]
    if path == "/v1/responses":
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] in ("response.completed", "response.incomplete")
        assert [one.sequence_number for one in found] == list(range(len(found)))
        assert found[-1].response.usage.input_tokens > 50
        return
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")
    assert found[0].message.usage.input_tokens > 50


def calls(found: list[Any], path: str) -> list[tuple[str, Any]]:
    """Names and arguments."""
    if path == "/v1/chat/completions":
        deltas = [d for one in found if one.choices for d in one.choices[0].delta.tool_calls or ()]
        return [(one.function.name, json.loads(one.function.arguments)) for one in deltas]
    if path == "/v1/responses":
        items = found[-1].response.output
        return [(i.name, json.loads(i.arguments)) for i in items if i.type == "function_call"]
    names = [
        one.content_block.name
        for one in found
        if one.type == "content_block_start" and one.content_block.type == "tool_use"
    ]
    texts = [
        one.delta.partial_json
        for one in found
        if one.type == "content_block_delta" and one.delta.type == "input_json_delta"
    ]
    return list(zip(names, map(json.loads, texts), strict=True))


@pytest.mark.parametrize("file", RECORDED, ids=[path.stem for path in RECORDED])
def test_a_request_is_answered(agent_server: Running, file: Path) -> None:
    recorded = json.loads(file.read_text(encoding="utf-8"))
    path = path_of(recorded)
    reply = asked(agent_server, recorded, recorded["body"])
    check_whole(events(reply, path), path)
    said = reply.headers
    assert said.get("x-conmoe-ignored") == recorded["ignored"]
    assert said.get("x-conmoe-changed") == recorded["changed"]


@pytest.mark.parametrize("file", WITH_TOOLS, ids=[path.stem for path in WITH_TOOLS])
def test_its_tool_can_be_called(agent_server: Running, file: Path) -> None:
    """As it is, with the choice of one tool: what comes is a call, in the events of its API."""
    recorded = json.loads(file.read_text(encoding="utf-8"))
    body, path = recorded["body"], path_of(recorded)
    tool = body["tools"][0].get("function", body["tools"][0])
    name = tool["name"]
    fixed = {"type": "object", "properties": {"command": {"const": "ls"}}, "required": ["command"]}
    schema = "input_schema" if "input_schema" in tool else "parameters"
    tool |= {schema: {**fixed, "additionalProperties": False}}
    body |= {
        "/v1/chat/completions": {"tool_choice": {"type": "function", "function": {"name": name}}},
        "/v1/responses": {"tool_choice": {"type": "function", "name": name}},
        "/v1/messages": {"tool_choice": {"type": "tool", "name": name}},
    }[path]
    body |= {"thinking": {"type": "disabled"}} if path == "/v1/messages" else {}
    body.pop("output_config", None)
    if path != "/v1/messages":
        body["chat_template_kwargs"] = {"enable_thinking": False}
    found = events(asked(agent_server, recorded, body), path)
    check_whole(found, path)
    assert calls(found, path) == [(name, {"command": "ls"})]


def test_one_is_recorded_of_each_api() -> None:
    paths = {path_of(json.loads(file.read_text(encoding="utf-8"))) for file in RECORDED}
    assert paths == set(EVENTS)
