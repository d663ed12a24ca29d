"""The JSON that clients get: OpenAI's objects, and the server-sent events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from conmoe_edge.serve.jobs import Finish, Usage

DONE = b"data: [DONE]\n\n"
STILL_HERE = b": waiting\n\n"
"""A comment, which clients skip and which keeps what lies between from closing the connection."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The frame that every part of one answer stands in."""

    model: str
    chat: bool
    usage_at_end: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if not self.id:
            kind = "chatcmpl" if self.chat else "cmpl"
            object.__setattr__(self, "id", f"{kind}-{secrets.token_hex(12)}")

    def whole(self, text: str, finish: Finish, usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        if self.chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
            name = "chat.completion"
        else:
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
            name = "text_completion"
        return {**self._head(name), "choices": [choice], "usage": usage_json(usage)}

    def start(self) -> bytes:
        """Begins a stream; a text completion's begins with its text."""
        return self._event({"role": "assistant", "content": ""}) if self.chat else b""

    def piece(self, text: str) -> bytes:
        """A piece of the text."""
        return self._event({"content": text}) if self.chat else self._event(text)

    def end(self, finish: Finish, usage: Usage) -> bytes:
        """Why it ended, the usage where it was asked for, and the end mark."""
        last = self._event({} if self.chat else "", finish)
        if self.usage_at_end:
            tail = {**self._chunk_head(), "choices": [], "usage": usage_json(usage)}
            last += event(tail)
        return last + DONE

    def _event(self, content: Any, finish: Finish | None = None) -> bytes:
        part = {"delta": content} if self.chat else {"text": content}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self.usage_at_end else {}
        return event({**self._chunk_head(), "choices": [choice], **usage})

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}


def usage_json(usage: Usage) -> dict[str, Any]:
    """``usage`` as OpenAI has it."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return (
        b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


def models(model: str, created: int) -> dict[str, Any]:
    """``GET /v1/models``: the one model."""
    return {"object": "list", "data": [model_json(model, created)]}


def model_json(model: str, created: int) -> dict[str, Any]:
    """``GET /v1/models/NAME``."""
    return {"id": model, "object": "model", "created": created, "owned_by": "conmoe-edge"}
