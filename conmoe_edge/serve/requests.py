"""What clients may ask, checked: JSON bytes to ``ChatRequest`` or ``CompletionRequest``.

Every field of OpenAI's API is one of three: *honoured*; *harmless* (``metadata``, say: it does not
change the answer), accepted and left alone; or *refused*, unless it has the value that asks for nothing
(``n=1``, ``tools=[]``, ``logprobs=false``). Unknown names are refused, as OpenAI does, so that a
misspelt ``temprature`` is not silently ignored. A field that is there twice is refused too: which of the two was
meant nobody knows.

Memory: the body's text once more, and about 100 bytes for each of at most ``MOST_VALUES`` values and as many again as
the context has tokens. They are counted before they are made, since a body of brackets comes to thirty times its size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.serve.http_errors import ApiError

MOST_STOPS = 4
LONGEST_STOP = 256
LONGEST_USER = 512
MOST_VALUES = 16_384
"""Of a request beside the numbers of a prompt: 512 messages in parts, with room to spare."""
MOST_FIELDS = 64
"""Of one JSON object; the API itself has fewer."""
_HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
_NOTHING: dict[str, tuple[Any, ...]] = {
    # A field that is not supported, and the values with which it asks for nothing.
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0, 0.0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0, 0.0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}

_Strict = ConfigDict(extra="forbid", strict=True, frozen=True)

_First = Field(fail_fast=True)  # a list of ten thousand wrong values is one complaint


class StreamOptions(BaseModel):
    """``include_obfuscation`` is accepted and left alone."""

    model_config = _Strict
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextPart(BaseModel):
    """The only kind of part there is."""

    model_config = _Strict
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; ``developer`` is what newer clients call ``system``."""

    model_config = _Strict
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], _First]
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class _Request(BaseModel):
    """What both endpoints share."""

    model_config = _Strict
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=1 << 31)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=LONGEST_USER)

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        given = [value] if isinstance(value, str) else value or []
        if len(given) > MOST_STOPS or any(not 0 < len(stop) <= LONGEST_STOP for stop in given):
            raise ValueError(
                f"at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters can stop an answer"
            )
        return value

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens

    @property
    def sampling(self) -> SamplingSettings:
        """What was asked for; the rest is the model's own."""
        return SamplingSettings(
            max_tokens=self.limit,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, under its newer or its older name."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    """``POST /v1/completions``: one prompt, as text or as tokens."""

    prompt: str | Annotated[list[str], _First] | Annotated[list[int], _First]

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, value: str | list[str] | list[int]) -> str | list[str] | list[int]:
        if isinstance(value, list) and (
            not value or (isinstance(value[0], str) and len(value) > 1)
        ):
            raise ValueError("one prompt a request, as a string or as a list of tokens")
        return value


R = TypeVar("R", ChatRequest, CompletionRequest)


def read_request(
    body: bytes, kind: type[R], most_messages: int, most_values: int = MOST_VALUES
) -> R:
    """The request in ``body``, of at most ``most_values`` JSON values.

    Raises:
        ApiError: 400, with the field that is wrong as ``param``.
    """
    value = _json(body, most_values)
    value = _without_nothings(value)
    if "messages" in value and isinstance(value["messages"], list):
        if len(value["messages"]) > most_messages:
            raise ApiError(
                400,
                f"At most {most_messages} messages, not {len(value['messages'])}.",
                param="messages",
            )
        value["messages"] = [_plain_message(one) for one in value["messages"]]
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _field_error(error) from None


def count_values(body: bytes) -> int:
    """JSON values in ``body``, names of fields included, without making them: the marks outside its strings. For
    bytes that are no JSON, some number."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = np.frombuffer(plain, dtype=np.uint8)
    inside = np.bitwise_xor.accumulate(marks == ord('"')) if len(marks) else marks.astype(bool)
    outside = ~inside
    return 1 + sum(int(np.count_nonzero(outside & (marks == ord(mark)))) for mark in ",:[{")


def _json(body: bytes, most_values: int) -> dict[str, Any]:
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


def _without_nothings(value: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, one in value.items():
        if name in _NOTHING:
            if not _asks_for_nothing(name, one):
                raise ApiError(
                    400,
                    f"{name} is not supported by this server.",
                    param=name,
                    code="unsupported_parameter",
                )
        elif name == "user" or name not in _HARMLESS:
            kept[name] = one
    return kept


def _asks_for_nothing(name: str, value: Any) -> bool:
    return any(type(value) is type(one) and value == one for one in _NOTHING[name])


def _plain_message(message: Any) -> Any:
    """What clients send back of an answer they got: fields that are empty."""
    if not isinstance(message, dict):
        return message
    empty = ("tool_calls", "function_call", "audio", "annotations", "refusal", "reasoning_content")
    return {k: v for k, v in message.items() if k not in empty or v not in (None, [], "")}


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
        return ApiError(
            400, f"{where}: only text is supported.", param=where, code="unsupported_content"
        )
    text = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where}: {text}.", param=where, code="invalid_value")


def _place(parts: tuple[int | str, ...]) -> str:
    """``messages[0].content`` for pydantic's location; the names of union members are left out."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif (
            part and not part.startswith(("list[", "function-")) and part not in ("str", "TextPart")
        ):
            text += f".{part}" if text else part
    return text or "body"
