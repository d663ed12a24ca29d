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
    count_values,
    read_request,
)

CHAT = '{"model": "m", "messages": [{"role": "user", "content": "x"}]%s}'


def chat(more: str) -> ChatRequest:
    whole = '{"model": "m"%s}' if '"messages"' in more else CHAT  # no field may be there twice
    return read_request((whole % more).encode(), ChatRequest, 8)


@pytest.mark.parametrize(
    "more",
    [
        ', "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto"',
        ', "n": 1, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}',
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
        (', "n": 2', "n", "unsupported_parameter"),
        (', "n": true', "n", "unsupported_parameter"),
        (', "tools": [{"type": "function"}]', "tools", "unsupported_parameter"),
        (', "tool_choice": "required"', "tool_choice", "unsupported_parameter"),
        (
            ', "response_format": {"type": "json_object"}',
            "response_format",
            "unsupported_parameter",
        ),
        (', "logprobs": true', "logprobs", "unsupported_parameter"),
        (', "frequency_penalty": 0.5', "frequency_penalty", "unsupported_parameter"),
        (', "logit_bias": {"5": 1}', "logit_bias", "unsupported_parameter"),
        (', "temprature": 1', "temprature", "unknown_parameter"),
        (', "temperature": "hot"', "temperature", "invalid_value"),
        (', "temperature": 2.5', "temperature", "invalid_value"),
        (', "temperature": 1e999', "temperature", "invalid_value"),
        (', "max_tokens": 0', "max_tokens", "invalid_value"),
        (', "max_tokens": 1.5', "max_tokens", "invalid_value"),
        (', "max_tokens": true', "max_tokens", "invalid_value"),
        (', "stop": ["a", "b", "c", "d", "e"]', "stop", "invalid_value"),
        (', "stop": [""]', "stop", "invalid_value"),
        (', "stream_options": {"x": 1}', "stream_options.x", "unknown_parameter"),
        (', "messages": []', "messages", "invalid_value"),
        (', "messages": [{"role": "user"}]', "messages[0].content", "missing_required_parameter"),
        (', "messages": [{"role": "tool", "content": "x"}]', "messages[0].role", "invalid_value"),
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
