"""Anthropic's Messages API in terms of OpenAI's chat: requests translated, replies told in its own objects and events.

Text, calls of tools, what came of them, and reasoning; pictures, documents and tools that a server runs are refused or,
where the model can do without them, left out and named. Source: Anthropic's API reference, version 2023-06-01.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from conmoe_edge.offload.generation.answer_parts import Called, Part, Said, Thought
from conmoe_edge.offload.generation.token_scores import TokenScore
from conmoe_edge.serve.http_errors import ApiError, anthropic_body, only_text
from conmoe_edge.serve.jobs import Done
from conmoe_edge.serve.replies import Whole, call_id, event
from conmoe_edge.serve.tool_requests import function_tools
from conmoe_edge.serve.tool_results import result_texts

_FIELDS = {"name": "name", "description": "description", "parameters": "input_schema"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_of_messages(value: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """OpenAI's form of a request, and the names of what was left out.

    Raises:
        ApiError: a part has no counterpart.
    """
    given, ignored = dict(value), []
    chat: dict[str, Any] = {}
    messages: list[Any] = []
    system = given.pop("system", None)
    if system is not None:
        messages.append({"role": "system", "content": _text(system, "system")})
    said = given.pop("messages", None)
    if not isinstance(said, list):
        raise ApiError(400, "messages is missing.", param="messages")
    for index, message in enumerate(said):
        messages += _messages(message, f"messages[{index}]", ignored)
    chat["messages"] = messages
    if given.get("max_tokens") is None:
        raise ApiError(400, "max_tokens is missing.", param="max_tokens")
    tools = given.pop("tools", None)
    if tools:
        chat["tools"] = function_tools(tools, _FIELDS, "custom", ignored, usual="custom")
    choice = given.pop("tool_choice", None)
    if isinstance(choice, dict):
        kind = choice.get("type")
        if kind == "tool":
            named = {"name": choice.get("name")}
            chat["tool_choice"] = {"type": "function", "function": named}
        elif kind in _CHOICES:
            chat["tool_choice"] = _CHOICES[kind]
        else:
            raise ApiError(400, "tool_choice.type: auto, any, tool or none.", param="tool_choice")
        chat["parallel_tool_calls"] = choice.get("disable_parallel_tool_use") is not True
    if "stop_sequences" in given:
        chat["stop"] = given.pop("stop_sequences") or None
    metadata = given.pop("metadata", None)
    if isinstance(metadata, dict) and isinstance(metadata.get("user_id"), str):
        chat["user"] = metadata["user_id"][:512]
    chat |= _thinking(given.pop("thinking", None))
    chat |= _output(given.pop("output_config", None), ignored)
    if given.pop("context_management", None):
        ignored.append("context_management")
    return {**given, **chat}, ignored


def count_of_messages(value: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """As ``chat_of_messages``, for a request whose tokens are only counted."""
    return chat_of_messages({**value, "max_tokens": 1})


def _thinking(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {}
    if value.get("type") == "disabled":
        return {"chat_template_kwargs": {"enable_thinking": False}}
    budget = value.get("budget_tokens")
    wish = {} if budget is None else {"thinking_budget": budget}
    return {"chat_template_kwargs": {"enable_thinking": True}, **wish}


def _output(value: Any, ignored: list[str]) -> dict[str, Any]:
    """What an answer has to be, and how much it should be thought about."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ApiError(400, "output_config: an object.", param="output_config")
    chat: dict[str, Any] = {}
    if value.get("effort") is not None:
        chat["reasoning_effort"] = value["effort"]
    form = value.get("format")
    if form is not None:
        schema = form.get("schema") if isinstance(form, dict) else None
        if not isinstance(schema, dict) or form.get("type") != "json_schema":
            raise ApiError(
                400, "output_config.format: a json_schema.", param="output_config.format"
            )
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    ignored += [f"output_config.{name}" for name in value if name not in ("effort", "format")]
    return chat


def _messages(message: Any, where: str, ignored: list[str]) -> list[dict[str, Any]]:
    """A message of blocks is several of OpenAI's: what came of tools first."""
    if not isinstance(message, dict):
        raise ApiError(400, f"{where}: an object.", param=where)
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str) or not isinstance(content, list):
        return [{"role": role, "content": content}]
    before: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        place = f"{where}.content[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(_text([block], place))
        elif kind == "tool_result":
            given = block.get("content") or ""
            text = "\n".join(result_texts(given, f"{place}.content", ("text",), ignored))
            if block.get("is_error") is True:
                text = f"Error: {text}"
            before.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}
            )
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind != "redacted_thinking":
            raise only_text(place)
    if not (texts or calls or thoughts):
        return before or [{"role": role, "content": ""}]
    whole: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if thoughts:
        whole["reasoning_content"] = "".join(thoughts)
    if calls:
        whole["tool_calls"] = calls
    return [*before, whole]


def _text(value: Any, where: str) -> str:
    """A text, or the texts of blocks."""
    if isinstance(value, str):
        return value
    parts = []
    for block in value if isinstance(value, list) else [value]:
        text = block.get("text") if isinstance(block, dict) else None
        if not isinstance(text, str) or block.get("type") != "text":
            raise only_text(where)
        parts.append(text)
    return "\n".join(parts)


class MessageReply:
    """One answer as a ``message`` and its events."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._id = f"msg_{secrets.token_hex(12)}"
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._index = -1
        self._kind: type[Part] | None = None
        self._called = False

    def start(self) -> bytes:
        """As of ``Reply``."""
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        message = {**self._head(), "content": [], "stop_reason": None, "usage": usage}
        return _event("message_start", message={**message, "stop_sequence": None})

    def more(self, index: int, parts: Sequence[Part], scores: Sequence[TokenScore]) -> bytes:
        """As of ``Reply``."""
        found = b""
        for part in parts:
            if self._kind is not type(part) or isinstance(part, Called):
                found += self._stop() + self._begin(part)
            found += _event("content_block_delta", index=self._index, delta=_delta(part))
        return found

    def end(self, index: int, over: Done) -> bytes:
        """As of ``Reply``."""
        delta = {"stop_reason": _reason(over, self._called), "stop_sequence": over.stop}
        return self._stop() + _event("message_delta", delta=delta, usage=_usage(over))

    def close(self) -> bytes:
        """As of ``Reply``."""
        return _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        """As of ``Reply``."""
        return event(anthropic_body(error), "error")

    def whole(self, answers: Sequence[Whole]) -> dict[str, Any]:
        """As of ``Reply``."""
        (one,) = answers
        blocks: list[dict[str, Any]] = []
        if one.thought:
            blocks.append({"type": "thinking", "thinking": one.thought, "signature": ""})
        if one.said:
            blocks.append({"type": "text", "text": one.said})
        for call in one.calls:
            given = json.loads(call.arguments)
            blocks.append({"type": "tool_use", "id": _id(), "name": call.name, "input": given})
        return {
            **self._head(),
            "content": blocks,
            "stop_reason": _reason(one.over, bool(one.calls)),
            "stop_sequence": one.over.stop,
            "usage": _usage(one.over),
        }

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model}

    def _begin(self, part: Part) -> bytes:
        self._index += 1
        self._kind = type(part)
        if isinstance(part, Called):
            self._called = True
            block = {"type": "tool_use", "id": _id(), "name": part.name, "input": {}}
        elif isinstance(part, Thought):
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        return _event("content_block_start", index=self._index, content_block=block)

    def _stop(self) -> bytes:
        if self._kind is None:
            return b""
        self._kind = None
        return _event("content_block_stop", index=self._index)


def _delta(part: Part) -> dict[str, Any]:
    if isinstance(part, Called):
        return {"type": "input_json_delta", "partial_json": part.arguments}
    if isinstance(part, Said):
        return {"type": "text_delta", "text": part.text}
    return {"type": "thinking_delta", "thinking": part.text}


def _reason(over: Done, called: bool) -> str:
    if over.finish == "length":
        return "max_tokens"
    if over.stop is not None:
        return "stop_sequence"
    return "tool_use" if called else "end_turn"


def _usage(over: Done) -> dict[str, Any]:
    usage = over.usage
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
    }


def _id() -> str:
    return f"toolu_{call_id()}"


def _event(kind: str, **more: Any) -> bytes:
    return event({"type": kind, **more}, kind)
