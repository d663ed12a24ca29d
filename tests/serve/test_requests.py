"""Requests: what is honoured, ignored and refused."""

from __future__ import annotations

import pytest

from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.serve.http_errors import ApiError
from conmoe_edge.serve.requests import ChatRequest, CompletionRequest, read_request

CHAT = '{"model": "m", "messages": [{"role": "user", "content": "x"}]%s}'


def chat(more: str) -> ChatRequest:
    return read_request((CHAT % more).encode(), ChatRequest, 8)


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
