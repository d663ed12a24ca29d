"""OpenAI's Responses API in terms of its chat: requests translated, replies told as items and their events.

Nothing is stored, so ``previous_response_id`` and ``conversation`` are refused; clients send the whole conversation, as
coding agents do. Tools that OpenAI's servers run are left out and named. Source: OpenAI's API reference.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from conmoe_edge.offload.generation.answer_parts import Called, Part, Said, Thought
from conmoe_edge.offload.generation.token_scores import TokenScore
from conmoe_edge.serve.http_errors import ApiError, only_text
from conmoe_edge.serve.jobs import Done
from conmoe_edge.serve.replies import Whole, call_id, event
from conmoe_edge.serve.request_fields import refuse_wish
from conmoe_edge.serve.tool_requests import function_tools
from conmoe_edge.serve.tool_results import result_texts

_NOTHING: dict[str, tuple[Any, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
}
_FIELDS = {name: name for name in ("name", "description", "parameters", "strict")}
_LEFT_ALONE = ("include", "max_tool_calls", "store", "truncation", "client_metadata")
_TEXTS = ("input_text", "output_text", "text")
_OF_ANSWERS = ("reasoning", "function_call", "custom_tool_call")


def chat_of_response(value: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """OpenAI's chat form of a request, and the names of what was left out.

    Raises:
        ApiError: a part has no counterpart.
    """
    given, ignored = dict(value), []
    for name, nothings in _NOTHING.items():
        refuse_wish(
            name,
            given.pop(name, None),
            nothings,
            "is not supported: this server stores nothing.",
        )
    for name in _LEFT_ALONE:
        given.pop(name, None)
    chat: dict[str, Any] = {"messages": _messages(given, ignored)}
    tools = given.pop("tools", None)
    if tools:
        chat["tools"] = function_tools(tools, _FIELDS, "function", ignored)
    choice = given.pop("tool_choice", None)
    if isinstance(choice, dict) and choice.get("type") == "function":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif choice is not None:
        chat["tool_choice"] = choice
    if "max_output_tokens" in given:
        chat["max_completion_tokens"] = given.pop("max_output_tokens")
    reasoning = given.pop("reasoning", None)
    if isinstance(reasoning, dict) and reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    text = given.pop("text", None)
    if isinstance(text, dict):
        chat |= _format(text.get("format"))
        if "verbosity" in text:
            chat["verbosity"] = text["verbosity"]
    if given.pop("top_logprobs", None):
        ignored.append("top_logprobs")
    return {**given, **chat}, ignored


def _format(wanted: Any) -> dict[str, Any]:
    if not isinstance(wanted, dict):
        return {}
    if wanted.get("type") != "json_schema":
        return {"response_format": wanted}
    inner = {k: v for k, v in wanted.items() if k != "type"}
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


def _messages(given: dict[str, Any], ignored: list[str]) -> list[dict[str, Any]]:
    """Items become messages; calls and reasoning belong to the answer around them."""
    messages: list[dict[str, Any]] = []
    instructions = given.pop("instructions", None)
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    items = given.pop("input", None)
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise ApiError(400, "input is missing.", param="input")
    open_answer: dict[str, Any] | None = None
    for index, item in enumerate(items):
        where = f"input[{index}]"
        if not isinstance(item, dict):
            raise ApiError(400, f"{where}: an object.", param=where)
        kind = item.get("type") or "message"
        is_answer = kind in _OF_ANSWERS or item.get("role") == "assistant"
        if is_answer and open_answer is None:
            open_answer = {"role": "assistant", "content": None}
            messages.append(open_answer)
        elif not is_answer:
            open_answer = None
        if kind == "message" and open_answer is not None:
            text = _text(item.get("content"), where)
            if open_answer["content"] is not None or "tool_calls" in open_answer:
                open_answer = {"role": "assistant", "content": text}
                messages.append(open_answer)
            else:
                open_answer["content"] = text
        elif kind == "message":
            messages.append(
                {"role": item.get("role"), "content": _text(item.get("content"), where)}
            )
        elif kind in ("function_call", "custom_tool_call") and open_answer is not None:
            arguments = item.get("arguments")
            if kind == "custom_tool_call":  # of a tool that takes a text
                arguments = json.dumps({"input": item.get("input")}, ensure_ascii=False)
            function = {"name": item.get("name"), "arguments": arguments}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            open_answer.setdefault("tool_calls", []).append(call)
        elif kind == "reasoning" and open_answer is not None:
            texts = item.get("content") or item.get("summary") or ()
            thought = "".join(str(one.get("text") or "") for one in texts if isinstance(one, dict))
            if thought:
                open_answer["reasoning_content"] = thought
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output = "".join(result_texts(item.get("output"), f"{where}.output", _TEXTS, ignored))
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
            )
        else:
            raise ApiError(
                400,
                f"{where}: items of type {kind} are not supported.",
                param=where,
                code="unsupported_content",
            )
    for message in messages:
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""  # reasoning that was cut off
    return messages


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    parts = []
    for part in value if isinstance(value, list) else [None]:
        plain = part if isinstance(part, dict) else {}
        kind = plain.get("type")
        text = plain.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str) or kind not in (*_TEXTS, "refusal"):
            raise only_text(where)
        parts.append(text)
    return "".join(parts)


class ResponseReply:
    """One answer as a ``response`` and its events."""

    def __init__(self, model: str, asked: Mapping[str, Any]) -> None:
        """``asked``: what the response repeats of the request."""
        self._frame = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": None,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": None,
            "truncation": "disabled",
            "usage": None,
            **asked,
        }
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._number = -1
        self._over: Done | None = None

    def start(self) -> bytes:
        """As of ``Reply``."""
        now = {**self._frame, "status": "in_progress", "output": []}
        return self._event("response.created", response=now) + self._event(
            "response.in_progress", response=now
        )

    def more(self, index: int, parts: Sequence[Part], scores: Sequence[TokenScore]) -> bytes:
        """As of ``Reply``."""
        return b"".join(self._part(part) for part in parts)

    def end(self, index: int, over: Done) -> bytes:
        """As of ``Reply``."""
        self._over = over
        return self._stop()

    def close(self) -> bytes:
        """As of ``Reply``."""
        assert self._over is not None, "the answer is over"
        value = self._whole(self._over)
        return self._event(f"response.{value['status']}", response=value)

    def failed(self, error: ApiError) -> bytes:
        """As of ``Reply``."""
        about = {"code": error.code or "server_error", "message": error.message}
        value = {**self._frame, "status": "failed", "error": about, "output": self._items}
        return self._event("response.failed", response=value)

    def whole(self, answers: Sequence[Whole]) -> dict[str, Any]:
        """As of ``Reply``."""
        (one,) = answers
        for part in one.parts:
            self._part(part)
        self._stop()
        return self._whole(one.over)

    def _whole(self, over: Done) -> dict[str, Any]:
        usage = over.usage
        cut = over.finish == "length"
        return {
            **self._frame,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items,
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.completion,
            },
        }

    def _part(self, part: Part) -> bytes:
        if isinstance(part, Called):
            return self._stop() + self._call(part)
        kind = "reasoning" if isinstance(part, Thought) else "message"
        found = b""
        if self._open is None or self._open["type"] != kind:
            found = self._stop() + self._begin(part)
        item = self._open
        assert item is not None
        item["content"][0]["text"] += part.text
        name = _TEXT_EVENTS[kind]
        more = {"logprobs": []} if isinstance(part, Said) else {}
        return found + self._event(f"{name}.delta", **self._place(), delta=part.text, **more)

    def _begin(self, part: Part) -> bytes:
        if isinstance(part, Thought):
            item = {"type": "reasoning", "id": _id("rs"), "summary": [], "status": "in_progress"}
            content = {"type": "reasoning_text", "text": ""}
        else:
            item = {
                "type": "message",
                "id": _id("msg"),
                "role": "assistant",
                "status": "in_progress",
            }
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._items.append({**item, "content": [content]})
        self._open = self._items[-1]
        added = self._event(
            "response.output_item.added",
            output_index=len(self._items) - 1,
            item={**self._open, "content": []},
        )
        return added + self._event("response.content_part.added", **self._place(), part=content)

    def _stop(self) -> bytes:
        item = self._open
        if item is None:
            return b""
        content, name = item["content"][0], _TEXT_EVENTS[item["type"]]
        more = {"logprobs": []} if item["type"] == "message" else {}
        place = self._place()
        item["status"], self._open = "completed", None
        return (
            self._event(f"{name}.done", **place, text=content["text"], **more)
            + self._event("response.content_part.done", **place, part=content)
            + self._event(
                "response.output_item.done", output_index=place["output_index"], item=item
            )
        )

    def _call(self, call: Called) -> bytes:
        item = {
            "type": "function_call",
            "id": _id("fc"),
            "call_id": f"call_{call_id()}",
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        self._items.append(item)
        index = len(self._items) - 1
        begun = {**item, "arguments": "", "status": "in_progress"}
        place = {"item_id": item["id"], "output_index": index}
        name = "response.function_call_arguments"
        return (
            self._event("response.output_item.added", output_index=index, item=begun)
            + self._event(f"{name}.delta", **place, delta=call.arguments)
            + self._event(f"{name}.done", **place, name=call.name, arguments=call.arguments)
            + self._event("response.output_item.done", output_index=index, item=item)
        )

    def _place(self) -> dict[str, Any]:
        index = len(self._items) - 1
        return {
            "item_id": self._items[index]["id"],
            "output_index": index,
            "content_index": 0,
        }

    def _event(self, kind: str, **more: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **more}, kind)


_TEXT_EVENTS = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
