"""What clients may ask, checked: JSON bytes to ``ChatRequest`` or ``CompletionRequest``.

Every field is *honoured*, or goes the way of ``request_fields.py``: it changes no answer and is left alone, or it would
and is refused. A name nobody knows, such as a misspelt ``temprature``, is left out and said in a header, and refused
where the server is strict. A field that is there twice is refused always: which of the two was meant nobody knows.

Memory: the body's text once more, and about 100 bytes for each of at most ``MOST_VALUES`` values and as many again as
the context has tokens. They are counted before they are made, since a body of brackets comes to thirty times its size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from conmoe_edge.offload.generation.sampling_settings import (
    MOST_BIAS,
    MOST_LOGPROBS,
    MOST_PENALTY,
    SamplingSettings,
)
from conmoe_edge.serve.http_errors import ApiError, only_text
from conmoe_edge.serve.request_fields import sift
from conmoe_edge.serve.tool_requests import MOST_TOOLS, STRICT, NamedTool, Tool, ToolCall

MOST_STOPS = 16
LONGEST_STOP = 256
LONGEST_USER = 512
MOST_ANSWERS = 128
MOST_VALUES = 16_384
"""Of a request beside the numbers of a prompt: 512 messages in parts, with room to spare."""
MOST_FIELDS = 1024
"""Of one JSON object; a bias for a thousand tokens, or the schema of a large form."""

_First = Field(fail_fast=True)  # a list of ten thousand wrong values is one complaint


class StreamOptions(BaseModel):
    """``include_obfuscation`` is accepted and left alone."""

    model_config = STRICT
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextPart(BaseModel):
    """The only kind of part there is."""

    model_config = STRICT
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; ``developer`` is what newer clients call ``system``."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], _First] | None
    name: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], _First] | None = None
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.content is None and (self.role != "assistant" or not self.tool_calls):
            raise ValueError("only an answer that calls tools has no content")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError("only answers call tools or reason")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        value: dict[str, Any] = {"role": role, "content": text}
        if self.reasoning_content:
            value["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            value["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.role == "tool":
            value |= {
                name: given
                for name, given in (("tool_call_id", self.tool_call_id), ("name", self.name))
                if given is not None
            }
        return value


class _Request(BaseModel):
    """What both endpoints share."""

    model_config = STRICT
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=100, allow_inf_nan=False)
    frequency_penalty: float | None = Field(
        None, ge=-MOST_PENALTY, le=MOST_PENALTY, allow_inf_nan=False
    )
    presence_penalty: float | None = Field(
        None, ge=-MOST_PENALTY, le=MOST_PENALTY, allow_inf_nan=False
    )
    logit_bias: dict[str, float] | None = None
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=LONGEST_USER)
    ignored: tuple[str, ...] = Field((), exclude=True)

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        given = [value] if isinstance(value, str) else value or []
        if len(given) > MOST_STOPS or any(not 0 < len(stop) <= LONGEST_STOP for stop in given):
            raise ValueError(
                f"at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters can stop an answer"
            )
        return value

    @field_validator("logit_bias")
    @classmethod
    def _biases(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ValueError("it is from the numbers of tokens to what is added to their score")
            if not -MOST_BIAS <= bias <= MOST_BIAS:
                raise ValueError(f"a bias is from {-MOST_BIAS:g} to {MOST_BIAS:g}")
        return value

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens

    @property
    def scores(self) -> int | None:
        """Of how many of the likeliest tokens the log-probabilities are wanted; ``None`` for not at all."""
        return None

    @property
    def sampling(self) -> SamplingSettings:
        """What was asked for; the rest is the model's own."""
        bias = {int(token): float(value) for token, value in (self.logit_bias or {}).items()}
        return SamplingSettings(
            max_tokens=self.limit,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,  # other servers' word for all
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=tuple(sorted(bias.items())),
            logprobs=self.scores,
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class JsonSchema(BaseModel):
    """A schema with a name, which nobody looks at."""

    model_config = STRICT
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What an answer has to be."""

    model_config = STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _with_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise ValueError("json_schema is missing")
        return self

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The schema of the answer; ``None`` for any text."""
        if self.type == "text":
            return None
        named = None if self.json_schema is None else self.json_schema.schema_
        return self.schema_ or named or {"type": "object"}


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    thinking_budget: int | None = Field(None, ge=0)
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        choice = self.tool_choice
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"tool_choice names {choice.function.name}, which is not among tools")
        if choice == "required" and not names:
            raise ValueError("tool_choice is required, and there are no tools")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, under its newer or its older name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def scores(self) -> int | None:
        """As of ``_Request``."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """``POST /v1/completions``: prompts, as text or as tokens."""

    prompt: (
        str
        | Annotated[list[str], _First]
        | Annotated[list[int], _First]
        | Annotated[list[Annotated[list[int], _First]], _First]
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, value: Any) -> Any:
        if not value and not isinstance(value, str):
            raise ValueError(
                "a prompt is a string or a list of tokens; or there is a list of those"
            )
        return value

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: prompts get no scores here")
        return self

    @property
    def scores(self) -> int | None:
        """As of ``_Request``."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return [prompt] if isinstance(prompt[0], int) else prompt  # type: ignore[return-value]


R = TypeVar("R", ChatRequest, CompletionRequest)
_HONOURED: dict[type[BaseModel], frozenset[str]] = {
    kind: frozenset(kind.model_fields) - {"ignored"} for kind in (ChatRequest, CompletionRequest)
}


def check_request(
    value: dict[str, Any], kind: type[R], most_messages: int, *, strict: bool = False
) -> R:
    """The request in a JSON object, which is emptied of what is not honoured.

    Raises:
        ApiError: 400, with the field that is wrong as ``param``.
    """
    ignored = sift(value, _HONOURED[kind], strict)
    if "messages" in value and isinstance(value["messages"], list):
        if len(value["messages"]) > most_messages:
            raise ApiError(
                400,
                f"At most {most_messages} messages, not {len(value['messages'])}.",
                param="messages",
            )
        value["messages"] = [_plain_message(one) for one in value["messages"]]
    try:
        asked = kind.model_validate(value, extra="forbid" if strict else "ignore")
    except ValidationError as error:
        raise _field_error(error) from None
    return asked.model_copy(update={"ignored": tuple(ignored)})


def count_values(body: bytes) -> int:
    """JSON values in ``body``, names of fields included, without making them: the marks outside its strings. For
    bytes that are no JSON, some number."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = np.frombuffer(plain, dtype=np.uint8)
    inside = np.bitwise_xor.accumulate(marks == ord('"')) if len(marks) else marks.astype(bool)
    outside = ~inside
    return 1 + sum(int(np.count_nonzero(outside & (marks == ord(mark)))) for mark in ",:[{")


def read_json(body: bytes, most_values: int) -> dict[str, Any]:
    """The JSON object in ``body``.

    Raises:
        ApiError: it is none, or has more than ``most_values`` values.
    """
    if count_values(body) > most_values:
        raise ApiError(400, f"The body has more than {most_values} values.")
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
        # A lone half of a surrogate pair is valid JSON and no text; only an escape can write one.
        if _HALF.search(text):
            for one in _strings(value):
                one.encode("utf-8")
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body has to be a JSON object.")
    return value


_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose names have to differ."""
    if len(pairs) > MOST_FIELDS:
        raise ApiError(400, f"An object in the body has more than {MOST_FIELDS} fields.")
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            shown = name.encode("utf-8", "replace").decode()[:100]
            raise ApiError(400, f"{shown!r} is there twice.", code="repeated_field")
        seen.add(name)
    return value


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            left += one
            left += one.values()
        elif isinstance(one, list):
            left += one


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _plain_message(message: Any) -> Any:
    """What clients send back of an answer they got: fields that are empty, and reasoning under another name."""
    if not isinstance(message, dict):
        return message
    empty = ("tool_calls", "function_call", "audio", "annotations", "refusal", "reasoning_content")
    plain = {k: v for k, v in message.items() if k not in empty or v not in (None, [], "")}
    if plain.get("role") == "assistant":
        if "tool_calls" in plain:
            plain.setdefault("content", None)
        reasoning = plain.pop("reasoning", None)
        if isinstance(reasoning, str) and reasoning:
            plain.setdefault("reasoning_content", reasoning)
    return plain


def _field_error(error: ValidationError) -> ApiError:
    """The first complaint, in words that name the field."""
    found = error.errors(include_url=False, include_input=False)
    # Of a field that may be several things, the one that came furthest is what was meant.
    stem = found[0]["loc"][:-1]
    first = max(
        (one for one in found if one["loc"][: len(stem)] == stem), key=lambda e: len(e["loc"])
    )
    where = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{where} is not known here.", param=where, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing.", param=where, code="missing_required_parameter")
    part = first["loc"]
    if "content" in part and part[-1] in ("type", "image_url", "input_audio", "file"):
        return only_text(where)
    text = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where}: {text}.", param=where, code="invalid_value")


_IS_MEMBER = re.compile(
    r"(list|literal|nullable|constrained-str)\[.*|function-.*|constrained-str|str|TextPart|NamedTool"
).fullmatch


def _place(parts: tuple[int | str, ...]) -> str:
    """``messages[0].content`` for pydantic's location; the names of union members are left out."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part and not _IS_MEMBER(part):
            text += f".{part}" if text else part
    return text or "body"
