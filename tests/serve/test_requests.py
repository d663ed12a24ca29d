"""Requests: what is honoured, ignored and refused."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.serve.http_errors import ApiError
from conmoe_edge.serve.requests import (
    MOST_VALUES,
    ChatRequest,
    CompletionRequest,
    R,
    check_request,
    count_values,
    read_json,
)

CHAT = '{"model": "m", "messages": [{"role": "user", "content": "x"}]%s}'


def read_request(
    body: bytes, kind: type[R], most: int, values: int = MOST_VALUES, *, strict: bool = False
) -> R:
    return check_request(read_json(body, values), kind, most, strict=strict)


def chat(more: str, strict: bool = True) -> ChatRequest:
    whole = '{"model": "m"%s}' if '"messages"' in more else CHAT  # no field may be there twice
    return read_request((whole % more).encode(), ChatRequest, 8, strict=strict)


@pytest.mark.parametrize(
    "more",
    [
        ', "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto"',
        ', "n": 1, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}',
        ', "keep_alive": "5m", "best_of": 1, "mirostat": 0, "typical_p": 1.0, "audio": null',
        ', "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": false, "logit_bias": {}',
        ', "stop": null, "stream": null, "max_tokens": null, "temperature": null, "seed": -1',
        ', "stream_options": {"include_usage": true}, "top_k": 5, "stop": ["a", "b"]',
    ],
)
def test_what_asks_for_nothing_is_taken(more: str) -> None:
    assert chat(more).model == "m"


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        (', "n": 0', "n", "invalid_value"),
        (', "n": true', "n", "invalid_value"),
        (', "n": 1000', "n", "invalid_value"),
        (', "best_of": 2', "best_of", "unsupported_parameter"),
        (', "mirostat": 2', "mirostat", "unsupported_parameter"),
        (', "guided_json": {}', "guided_json", "unsupported_parameter"),
        (', "logit_bias": {"5": 101}', "logit_bias", "invalid_value"),
        (', "logit_bias": {"the": 1}', "logit_bias", "invalid_value"),
        (', "frequency_penalty": 2.5', "frequency_penalty", "invalid_value"),
        (', "min_p": -0.1', "min_p", "invalid_value"),
        (', "logprobs": true, "top_logprobs": 21', "top_logprobs", "invalid_value"),
        (', "tools": [{"type": "function"}]', "tools[0].function", "missing_required_parameter"),
        (', "tool_choice": "some"', "tool_choice", "invalid_value"),
        (', "response_format": {"type": "xml"}', "response_format.type", "invalid_value"),
        (', "reasoning_effort": "endless"', "reasoning_effort", "invalid_value"),
        (', "temprature": 1', "temprature", "unknown_parameter"),
        (', "temperature": "hot"', "temperature", "invalid_value"),
        (', "temperature": 2.5', "temperature", "invalid_value"),
        (', "temperature": 1e999', "temperature", "invalid_value"),
        (', "max_tokens": 0', "max_tokens", "invalid_value"),
        (', "max_tokens": 1.5', "max_tokens", "invalid_value"),
        (', "max_tokens": true', "max_tokens", "invalid_value"),
        (f', "stop": {json.dumps(["a"] * 17)}', "stop", "invalid_value"),
        (', "stop": [""]', "stop", "invalid_value"),
        (', "stream_options": {"x": 1}', "stream_options.x", "unknown_parameter"),
        (', "messages": []', "messages", "invalid_value"),
        (', "messages": [{"role": "user"}]', "messages[0].content", "missing_required_parameter"),
        (', "messages": [{"role": "other", "content": "x"}]', "messages[0].role", "invalid_value"),
        (', "messages": [{"role": "user", "content": null}]', "messages[0]", "invalid_value"),
        (
            ', "messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function":'
            ' {"name": "f", "arguments": "[1]"}}]}]',
            "messages[0].tool_calls[0].function.arguments",
            "invalid_value",
        ),
    ],
)
def test_what_cannot_be_done_is_said(more: str, param: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(more)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


def test_pictures_are_refused_by_name() -> None:
    part = '{"type": "image_url", "image_url": {"url": "data:"}}'
    with pytest.raises(ApiError, match="only text") as caught:
        chat(f', "messages": [{{"role": "user", "content": [{part}]}}]')
    assert caught.value.code == "unsupported_content"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"model": ' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    for kind in (ChatRequest, CompletionRequest):
        with pytest.raises(ApiError) as caught:
            read_request(body, kind, 8)
        assert caught.value.status == 400


def test_messages_in_every_form_that_clients_send() -> None:
    body = """{"model": "m", "messages": [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": null, "refusal": null, "annotations": []}
    ]}"""
    asked = read_request(body.encode(), ChatRequest, 8)
    assert [message.plain() for message in asked.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


def test_sampling_is_what_was_asked_for() -> None:
    asked = chat(', "temperature": 0.5, "top_k": 3, "seed": -1, "stop": "END", "max_tokens": 7')
    assert asked.sampling == SamplingSettings(
        max_tokens=7, temperature=0.5, top_k=3, seed=-1, stop=("END",)
    )
    assert chat(', "max_tokens": 7, "max_completion_tokens": 9').sampling.max_tokens == 9
    assert chat(', "stop": ["a", "b"]').sampling == SamplingSettings(stop=("a", "b"))


@pytest.mark.parametrize(
    "body",
    [
        '{"model": "m", "model": "m", "prompt": "x"}',
        '{"model": "m", "prompt": "x", "max_tokens": 1, "max_tokens": 1000}',
        '{"model": "m", "messages": [{"role": "user", "role": "system", "content": "x"}]}',
    ],
)
def test_a_field_that_is_there_twice_is_refused(body: str) -> None:
    with pytest.raises(ApiError, match="is there twice"):
        read_request(body.encode(), CompletionRequest, 8)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def _count(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + _count(one) for one in value.values())
    return 1 + sum(map(_count, value)) if isinstance(value, list) else 1


@given(_VALUES, st.booleans())
def test_values_are_counted_before_they_are_made(value: object, ascii_only: bool) -> None:
    counted = count_values(json.dumps(value, ensure_ascii=ascii_only).encode())
    assert _count(value) <= counted <= 2 * _count(value)


_MIB = 1 << 20
_BOMBS = {
    "lists": b'{"model": "m", "metadata": [' + b"[]," * (_MIB // 3) + b"0]}",
    "objects": b'{"model": "m", "metadata": [' + b"{}," * (_MIB // 3) + b"0]}",
    "empty strings": b'{"model": "m", "metadata": [' + b'"",' * (_MIB // 3) + b"0]}",
    "fields": b"{" + b",".join(b'"%x":1' % n for n in range(90_000)) + b"}",
    "numbers": b'{"model": "m", "prompt": [' + b"1," * (_MIB // 2) + b"1]}",
    "wrong parts": b'{"model": "m", "prompt": [' + b"null," * 15_000 + b"0]}",
    "quotes": b'"' * _MIB,
    "escapes": b"\\" * _MIB,
    "deep": b'{"a":' * 200_000,
    "one long text": b'{"model": "m", "metadata": "' + b"x" * _MIB + b'"}',
    "halves": b'{"model": "m", "prompt": "' + rb"\ud800" * 170_000 + b'"}',
    "few fields, many": b'{"model": "m", "metadata": {' + b'"a":1,' * 5000 + b'"b":1}}',
}


@pytest.mark.parametrize("name", _BOMBS)
def test_a_body_takes_a_few_times_its_bytes_at_the_most(name: str) -> None:
    body = _BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as caught:
            read_request(body, CompletionRequest, 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.status == 400
    assert peak < 3 * len(body) + 200 * MOST_VALUES, (peak, len(body))


def test_what_nobody_knows_is_said_unless_the_server_is_strict() -> None:
    more = (
        ', "temprature": 1, "verbosity": "low", "keep_alive": "5m", "store": true,'
        ' "stream_options": {"x": 1}, "repeat_penalty": 1.5'
    )
    asked = chat(more, strict=False)
    assert asked.ignored == ("temprature", "verbosity")
    assert asked.sampling.repetition_penalty == 1.5 and asked.temperature is None
    for wish in (', "audio": {}', ', "min_tokens": 5', ', "mirostat": 1'):
        with pytest.raises(ApiError, match="not supported"):
            chat(wish, strict=False)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (', "top_logprobs": 2', "needs logprobs"),
        (', "tool_choice": "required"', "there are no tools"),
        (
            ', "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice":'
            ' {"type": "function", "function": {"name": "g"}}',
            "names g",
        ),
        (
            f', "tools": {json.dumps([{"type": "function", "function": {"name": "f"}}] * 2)}',
            "same name",
        ),
    ],
)
def test_fields_that_do_not_fit_each_other(more: str, text: str) -> None:
    with pytest.raises(ApiError, match=text) as caught:
        chat(more)
    assert caught.value.status == 400


def test_calls_in_a_conversation_as_templates_take_them() -> None:
    call = {"id": "a1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    given = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call], "reasoning": "so"},
        {"role": "tool", "tool_call_id": "a1", "content": [{"type": "text", "text": "5"}]},
    ]
    body = json.dumps({"messages": given}).encode()
    plain = [message.plain() for message in read_request(body, ChatRequest, 8).messages]
    assert plain[1:] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "so",
            "tool_calls": [
                {"id": "a1", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
            ],
        },
        {"role": "tool", "content": "5", "tool_call_id": "a1"},
    ]


def test_prompts_in_every_form() -> None:
    for prompt, expected in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ):
        body = json.dumps({"prompt": prompt}).encode()
        assert read_request(body, CompletionRequest, 8).prompts == expected
    with pytest.raises(ApiError, match="echo with logprobs"):
        read_request(b'{"prompt": "a", "echo": true, "logprobs": 1}', CompletionRequest, 8)
