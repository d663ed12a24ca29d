"""The JSON that clients get: OpenAI's objects, and the server-sent events of a stream.

Every form of reply takes the parts of answers (``answer_parts.py``) as they come, by the number of the answer.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from conmoe_edge.offload.generation.answer_parts import Called, Part, Said, Thought
from conmoe_edge.offload.generation.token_scores import TokenScore
from conmoe_edge.serve.http_errors import ApiError
from conmoe_edge.serve.jobs import Done, Finish, Usage

DONE = b"data: [DONE]\n\n"
STILL_HERE = b": waiting\n\n"
"""A comment, which clients skip and which keeps what lies between from closing the connection."""

BytesOf = Callable[[int], bytes]


@dataclass(slots=True)
class Whole:
    """One answer that is over."""

    parts: list[Part]
    scores: list[TokenScore]
    over: Done

    @property
    def finish(self) -> Finish:
        """How it ended."""
        return self.over.finish

    @property
    def said(self) -> str:
        """Its text."""
        return "".join(part.text for part in self.parts if isinstance(part, Said))

    @property
    def thought(self) -> str:
        """Its reasoning."""
        return "".join(part.text for part in self.parts if isinstance(part, Thought))

    @property
    def calls(self) -> list[Called]:
        """The tools that it calls."""
        return [part for part in self.parts if isinstance(part, Called)]


class Reply(Protocol):
    """How answers to one request are told."""

    def start(self) -> bytes:
        """Begins a stream."""
        ...

    def more(self, index: int, parts: Sequence[Part], scores: Sequence[TokenScore]) -> bytes:
        """A piece of an answer."""
        ...

    def end(self, index: int, over: Done) -> bytes:
        """An answer is over."""
        ...

    def close(self) -> bytes:
        """All are."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """They cannot be made."""
        ...

    def whole(self, answers: Sequence[Whole]) -> dict[str, Any]:
        """All in one piece."""
        ...


def call_id() -> str:
    """A name for a call: nine letters and digits, which the templates of every family take."""
    return secrets.token_hex(5)[:9]


@dataclass
class _Frame:
    """What every part of one reply stands in.

    Attributes:
        model: its name.
        bytes_of: the bytes of a token.
        usage_at_end: whether a stream ends with its usage.
        per_prompt: answers that were asked for to each prompt.
        usages: of the answers that are over.
    """

    model: str
    bytes_of: BytesOf
    usage_at_end: bool = False
    per_prompt: int = 1
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    usages: dict[int, Usage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The forms' own."""

    def _usage(self) -> dict[str, Any]:
        return usage_json(together(self.usages, self.per_prompt))

    def failed(self, error: ApiError) -> bytes:
        """As of ``Reply``."""
        return event(error.body)

    def _event(self, name: str, choice: Mapping[str, Any]) -> bytes:
        usage = {"usage": None} if self.usage_at_end else {}
        return event({**self._head(name), "choices": [choice], **usage})

    def _close(self, name: str) -> bytes:
        if not self.usage_at_end:
            return DONE
        return event({**self._head(name), "choices": [], "usage": self._usage()}) + DONE

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}


class ChatReply(_Frame):
    """``chat.completion`` and its chunks."""

    def __post_init__(self) -> None:
        self.id = self.id or f"chatcmpl-{secrets.token_hex(12)}"
        self._started: set[int] = set()
        self._calls: dict[int, int] = {}

    def start(self) -> bytes:
        """As of ``Reply``."""
        return self._first(0)

    def more(self, index: int, parts: Sequence[Part], scores: Sequence[TokenScore]) -> bytes:
        """As of ``Reply``."""
        deltas = [self._delta(index, part) for part in parts]
        if scores and not deltas:
            deltas = [{}]
        found = self._first(index)
        for number, delta in enumerate(deltas):
            now = scores if number == 0 else ()  # of the piece, whichever part they belong to
            found += self._chunk(index, delta, scores=now)
        return found

    def end(self, index: int, over: Done) -> bytes:
        """As of ``Reply``."""
        self.usages[index] = over.usage
        why = "tool_calls" if over.finish == "stop" and self._calls.get(index) else over.finish
        return self._first(index) + self._chunk(index, {}, why)

    def close(self) -> bytes:
        """As of ``Reply``."""
        return self._close("chat.completion.chunk")

    def whole(self, answers: Sequence[Whole]) -> dict[str, Any]:
        """As of ``Reply``."""
        choices = []
        for index, one in enumerate(answers):
            self.usages[index] = one.over.usage
            calls = one.calls
            message: dict[str, Any] = {"role": "assistant", "content": one.said, "refusal": None}
            if one.thought:
                message["reasoning_content"] = one.thought
            if calls:
                message["content"] = one.said or None
                message["tool_calls"] = [_call_json(call) for call in calls]
            why = "tool_calls" if calls and one.finish == "stop" else one.finish
            scores = self._logprobs(one.scores)
            choices.append(
                {"index": index, "message": message, "logprobs": scores, "finish_reason": why}
            )
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    def _first(self, index: int) -> bytes:
        if index in self._started:
            return b""
        self._started.add(index)
        return self._chunk(index, {"role": "assistant", "content": ""})

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        finish: str | None = None,
        scores: Sequence[TokenScore] = (),
    ) -> bytes:
        logprobs = self._logprobs(scores)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._event("chat.completion.chunk", choice)

    def _delta(self, index: int, part: Part) -> dict[str, Any]:
        if isinstance(part, Called):
            number = self._calls.get(index, 0)
            self._calls[index] = number + 1
            return {"tool_calls": [{"index": number, **_call_json(part)}]}
        return {"reasoning_content" if isinstance(part, Thought) else "content": part.text}

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not scores:
            return None
        content = []
        for one in scores:
            pairs = zip(one.likeliest, one.logprobs, strict=True)
            best = [self._score(token, logprob) for token, logprob in pairs]
            content.append({**self._score(one.token, one.logprob), "top_logprobs": best})
        return {"content": content, "refusal": None}

    def _score(self, token: int, logprob: float) -> dict[str, Any]:
        spelt = self.bytes_of(token)
        text = spelt.decode("utf-8", "replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(spelt)}


class CompletionReply(_Frame):
    """``text_completion``, whole and in pieces; ``echoes`` are the prompts that answers begin with."""

    def __post_init__(self) -> None:
        self.id = self.id or f"cmpl-{secrets.token_hex(12)}"
        self.echoes: Sequence[str] = ()
        self._lengths: dict[int, int] = {}
        self._started: set[int] = set()

    def start(self) -> bytes:
        """As of ``Reply``; a text completion begins with its text."""
        return b""

    def more(self, index: int, parts: Sequence[Part], scores: Sequence[TokenScore]) -> bytes:
        """As of ``Reply``."""
        text = self._echo(index) + "".join(part.text for part in parts if isinstance(part, Said))
        return self._event(
            "text_completion", self._choice(index, text, self._logprobs(index, scores), None)
        )

    def end(self, index: int, over: Done) -> bytes:
        """As of ``Reply``."""
        self.usages[index] = over.usage
        return self._event(
            "text_completion", self._choice(index, self._echo(index), None, over.finish)
        )

    def close(self) -> bytes:
        """As of ``Reply``."""
        return self._close("text_completion")

    def whole(self, answers: Sequence[Whole]) -> dict[str, Any]:
        """As of ``Reply``."""
        choices = []
        for index, one in enumerate(answers):
            self.usages[index] = one.over.usage
            scores = self._logprobs(index, one.scores)
            choices.append(self._choice(index, self._echo(index) + one.said, scores, one.finish))
        return {**self._head("text_completion"), "choices": choices, "usage": self._usage()}

    @staticmethod
    def _choice(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _echo(self, index: int) -> str:
        if index in self._started or not self.echoes:
            return ""
        self._started.add(index)
        return self.echoes[index // self.per_prompt]

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not scores:
            return None
        at = self._lengths.get(index, 0)
        tokens, values, best, offsets = [], [], [], []
        for one in scores:
            text = self._text(one.token)
            tokens.append(text)
            values.append(_finite(one.logprob))
            pairs = zip(one.likeliest, one.logprobs, strict=True)
            best.append({self._text(token): _finite(logprob) for token, logprob in pairs})
            offsets.append(at)
            at += len(text)
        self._lengths[index] = at
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": best,
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        spelt = self.bytes_of(token)
        try:
            return spelt.decode()
        except UnicodeDecodeError:  # a part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def _call_json(call: Called) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call_id(), "type": "function", "function": function}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes what cannot come as -9999."""
    return max(logprob, -9999.0)


def together(usages: Mapping[int, Usage], per_prompt: int) -> Usage:
    """Of all answers to a request: a prompt counts once, however many answers it has."""
    firsts = [usage for index, usage in usages.items() if index % per_prompt == 0]
    return Usage(
        sum(one.prompt for one in firsts),
        sum(one.completion for one in usages.values()),
        sum(one.cached for one in firsts),
        sum(one.reasoning for one in usages.values()),
    )


def usage_json(usage: Usage) -> dict[str, Any]:
    """``usage`` as OpenAI has it."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def event(value: Any, name: str = "") -> bytes:
    """One server-sent event; line breaks in JSON are escaped, so it is one line."""
    head = f"event: {name}\n".encode() if name else b""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return head + b"data: " + text + b"\n\n"
