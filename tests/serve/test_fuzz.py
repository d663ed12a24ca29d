"""Whatever is sent, the server is still there afterwards and the fault was not its own."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.patience import PATIENCE
from tests.serve.conftest import NAME, Running

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(
        ["user", "assistant", "system", "text", "\ud800", "<|end|>", "\0", "9" * 500]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool"]) | json_values}
    )
    | st.fixed_dictionaries(
        {"role": st.just("user"), "content": json_values | st.text(max_size=40)}
    ),
    max_size=3,
)
fields = {
    "temperature": st.floats(0, 2) | json_values,
    "top_p": st.floats(0, 1) | json_values,
    "top_k": st.integers(-2, 2**40) | json_values,
    "seed": st.integers() | json_values,
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5) | json_values,
    "n": json_values,
    "stream": st.booleans() | json_values,
    "stream_options": json_values,
    "logprobs": json_values,
    "user": st.text() | json_values,
    "metadata": json_values,
    "response_format": json_values,
    "tools": json_values,
}
bodies = st.fixed_dictionaries(
    {"model": st.just(NAME) | json_values, "max_tokens": st.just(2) | st.integers(-2, 3)},
    optional={
        **fields,
        "messages": messages | json_values,
        "prompt": st.text(max_size=40) | json_values,
    },
)


def post(server: Running, path: str, body: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(server.url + path, headers=headers, content=body, timeout=PATIENCE)


def check(server: Running, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = post(server, path, body)
        assert response.status_code in (200, 400, 404, 413), (
            response.status_code,
            response.text,
            body,
        )
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        elif "event-stream" in response.headers["content-type"]:
            assert '"error"' not in response.text, response.text
    assert server.get("/health").status_code == 200


def check_bodies(server: Running, count: int) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(bodies)
    def run(body: dict[str, Any]) -> None:
        check(server, json.dumps(body).encode())

    run()
    server.idle()


def test_bodies_of_any_kind(server: Running) -> None:
    check_bodies(server, 40)


@pytest.mark.slow
def test_many_more_bodies(server: Running) -> None:
    check_bodies(server, 1500)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' * 50_000,
        b"[" * 500_000,
        b'{"model": "x", "messages": [' + b'{"role":"user","content":"x"},' * 30_000 + b"0]}",
        b'{"model": "'
        + NAME.encode()
        + b'", "messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"model": "' + NAME.encode() + b'", "max_tokens": 1e400, "prompt": "x"}',
        b'{"model": "' + NAME.encode() + b'", "temperature": ' + b"1" * 4000 + b', "prompt": "x"}',
        b'{"model": "' + NAME.encode() + b'", "prompt": "' + b"word " * 200_000 + b'"}',
        b"\x00\x01\x02",
    ],
    ids=["objects", "arrays", "messages", "surrogate", "infinite", "digits", "long", "bytes"],
)
def test_bodies_made_to_hurt(server: Running, body: bytes) -> None:
    check(server, body)
