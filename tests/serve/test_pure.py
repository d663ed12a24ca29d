"""The parts of the server that need no server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.runtime import RuntimeStats
from conmoe_edge.serve.http_errors import ApiError, as_api_error
from conmoe_edge.serve.kept_prompts import reusable
from conmoe_edge.serve.prometheus import FIRST_TOKEN_BUCKETS, Metrics, Snapshot
from conmoe_edge.serve.requests import ChatRequest, CompletionRequest, read_request
from conmoe_edge.serve.room import Room
from conmoe_edge.serve.settings import Settings, host_is_allowed
from conmoe_edge.serve.waiting import FairQueue

# The queue


def test_a_client_with_many_requests_does_not_keep_another_waiting() -> None:
    line: FairQueue[str] = FairQueue(10)
    for item in ("a1", "a2", "a3"):
        line.add("a", item)
    line.add("b", "b1")
    line.add("c", "c1")
    assert line.remove("a2")
    assert not line.remove("a2")
    line.add("b", "b2")
    assert [line.pop() for _ in range(len(line))] == ["a1", "b1", "c1", "a3", "b2"]
    assert line.first() is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=30))
def test_each_client_is_served_in_its_own_order(items: list[tuple[str, int]]) -> None:
    line: FairQueue[tuple[str, int]] = FairQueue(30)
    for client, number in items:
        line.add(client, (client, number))
    out = line.drain()
    for client in "abc":
        assert [one for one in out if one[0] == client] == [
            one for one in items if one[0] == client
        ]
    assert len(line) == 0


# Room


@given(
    context=st.integers(1, 5000),
    window=st.integers(1, 3000),
    wanted=st.lists(st.integers(1, 6000), max_size=12),
)
def test_conversations_never_take_more_than_was_planned(
    context: int, window: int, wanted: list[int]
) -> None:
    def cache_bytes(tokens: int) -> int:  # one layer that sees all, one that sees a window
        return 7 * tokens + 5 * min(tokens, window)

    room = Room(context, 256, cache_bytes)
    taken: list[int] = []
    for tokens in wanted:
        reserved = room.tokens(tokens)
        assert min(tokens, context) <= reserved <= context
        nbytes = room.nbytes(reserved)
        if room.fits(nbytes):
            room.take(nbytes)
            taken.append(nbytes)
        assert sum(taken) <= cache_bytes(context)
        assert cache_bytes(room.worth()) >= room.used
        assert room.worth() == 0 or cache_bytes(room.worth() - 1) < room.used
    for nbytes in taken:
        room.give_back(nbytes)
    assert room.used == 0


def test_one_conversation_may_have_it_all() -> None:
    room = Room(1000, 256, lambda tokens: 3 * tokens)
    assert room.fits(room.nbytes(room.tokens(5000)))


def test_only_whole_chunks_are_used_again_and_one_token_is_left() -> None:
    held = list(range(10))
    assert reusable(held, list(range(10)), 4) == 8
    assert reusable(held, list(range(8)), 4) == 4
    assert reusable(held, [0, 1, 2, 3, 4, 9, 9], 4) == 4
    assert reusable(held, [5, 6], 4) == 0


# Settings


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("localhost:8123", True),
        ("LOCALHOST.:8123", True),
        ("127.0.0.1:8123", True),
        ("[::1]:8123", True),
        ("192.168.1.4", True),
        ("tower.local:80", True),
        ("evil.example:8123", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        ("[::1", False),
        ("a]b", False),
    ],
)
def test_names_that_may_call(host: str, allowed: bool) -> None:
    assert host_is_allowed(host, ("tower.local",)) is allowed


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "tower.local", ""])
def test_others_need_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="no API key") as caught:
        Settings(Path("out"), host=host).check()
    assert "CONMOE_API_KEY=" in caught.value.fix
    Settings(Path("out"), host=host, api_key="k" * 20).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    Settings(Path("out"), host=host).check()


@pytest.mark.parametrize("key", ["", "a b", "ключ", "a\nb"])
def test_keys_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(UsageError, match="key"):
        Settings(Path("out"), api_key=key).check()


# Requests

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


# Errors and metrics


def test_a_bug_says_nothing_of_the_inside() -> None:
    error = as_api_error(RuntimeError("secret path /home/me"))
    assert error.status == 500
    assert "secret" not in str(error.body)


def test_buckets_add_up() -> None:
    metrics = Metrics()
    times = [0.05, 0.1, 0.2, 400.0]
    for seconds in times:
        metrics.first_token(seconds)
    metrics.answer("stop", 5, 2, 7)
    samples: dict[str, Any] = dict(
        line.rsplit(" ", 1)
        for line in metrics.text(Snapshot(), 'a"b\n').splitlines()
        if not line.startswith("#")
    )
    name = "conmoe_first_token_seconds"
    for bound in FIRST_TOKEN_BUCKETS:
        below = sum(seconds <= bound for seconds in times)
        assert samples[f'{name}_bucket{{le="{bound}"}}'] == str(below)
    assert samples[f'{name}_bucket{{le="+Inf"}}'] == samples[f"{name}_count"] == "4"
    assert float(samples[f"{name}_sum"]) == pytest.approx(sum(times))
    assert samples['conmoe_model_info{model="a\\"b\\n"}'] == "1"
    assert samples["conmoe_completion_tokens_total"] == "7"


@pytest.mark.parametrize("summary", [None, 'native, "4" of 4 layers'])
def test_what_computes_is_a_metric(summary: str | None) -> None:
    stats = RuntimeStats(1, 2, 3, 4, 5, 6, 7, 8, None, "cpu", kernel="native, AVX2")
    path = None if summary is None else SimpleNamespace(summary=summary)
    lines = Metrics().text(Snapshot(runtime=stats, fast_path=path), "m").splitlines()
    shown = "" if summary is None else summary.replace('"', '\\"')
    assert f'conmoe_compute_info{{kernel="native, AVX2",fast_path="{shown}"}} 1' in lines
