"""The endpoints, asked by the real ``openai`` client."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.patience import PATIENCE
from tests.serve.conftest import BUDGET, KEY, LIBRARY_SPREAD, NAME, Running, command, environment

QUESTION = "Tell me a short story about a lighthouse."
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 24}
OTHERS = ("Name three rivers.", "What is the sea?", "Write about a boat and a storm.")


def ask(client: openai.OpenAI, question: str = QUESTION, **more: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(messages=messages, **{**GREEDY, **more})


def text_of(reply: Any) -> str:
    return reply.choices[0].message.content


def streamed(stream: Any) -> tuple[str, list[Any]]:
    chunks = list(stream)
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    return "".join(parts), chunks


@pytest.fixture(scope="module")
def tokenizer(package: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package)


@pytest.fixture(scope="module")
def alone(client: openai.OpenAI) -> dict[str, str]:
    """Greedy answers, one at a time."""
    return {question: text_of(ask(client, question)) for question in (QUESTION, *OTHERS)}


# What comes back


def test_the_text_is_what_chat_says(package: Path, alone: dict[str, str]) -> None:
    words = ("--prompt", QUESTION, "--temperature", "0", "--max-tokens", "24", "--device", "cpu")
    done = subprocess.run(
        command("chat", str(package), "--gpu", BUDGET, *words, "--json"),
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert alone[QUESTION] == json.loads(done.stdout)["reply"]


def test_streams_say_the_same_and_count(
    client: openai.OpenAI, alone: dict[str, str], tokenizer: Any
) -> None:
    plain = ask(client)
    text, chunks = streamed(ask(client, stream=True, stream_options={"include_usage": True}))
    assert text == text_of(plain) == alone[QUESTION]
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].id != plain.id
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    for usage in (plain.usage, chunks[-1].usage):
        assert usage.prompt_tokens == len(prompt)
        assert usage.completion_tokens == 24
        assert usage.total_tokens == len(prompt) + 24
    without, plain_chunks = streamed(ask(client, stream=True))
    assert without == text and all(chunk.usage is None for chunk in plain_chunks)


def test_completions_from_text_and_from_tokens(client: openai.OpenAI, tokenizer: Any) -> None:
    prompt = "The river runs"
    by_text = client.completions.create(prompt=prompt, **GREEDY)
    ids = list(tokenizer(prompt).input_ids)
    by_tokens = client.completions.create(prompt=ids, **GREEDY)
    stream = client.completions.create(prompt=prompt, stream=True, **GREEDY)
    assert by_text.choices[0].text == by_tokens.choices[0].text
    assert by_text.choices[0].text == "".join(chunk.choices[0].text for chunk in stream)
    assert by_text.usage is not None and by_text.usage.prompt_tokens == len(ids)


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    drawn = [text_of(ask(client, temperature=1.0, seed=seed)) for seed in (1, 1, 2, -3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    for narrow in (
        {"top_p": 0},
        {"top_p": 1e-9},
        {"extra_body": {"top_k": 1}},
        {"temperature": 1e-30},
    ):
        assert text_of(ask(client, **{"temperature": 1.0, **narrow})) == text_of(ask(client))


def test_stop_strings_end_the_answer_and_are_not_in_it(
    client: openai.OpenAI, alone: dict[str, str]
) -> None:
    whole = alone[QUESTION]
    stop = whole[len(whole) // 2 :][:4]
    expected = whole[: whole.index(stop)]
    for given in (stop, ["never to be seen", stop]):
        reply = ask(client, stop=given)
        assert (text_of(reply), reply.choices[0].finish_reason) == (expected, "stop")
        assert reply.usage.completion_tokens < 24
        assert streamed(ask(client, stop=given, stream=True))[0] == expected


def test_the_newer_name_of_max_tokens(client: openai.OpenAI) -> None:
    reply = ask(client, max_tokens=None, max_completion_tokens=5)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (5, "length")


def test_a_conversation_uses_what_was_computed_and_stays_the_same(client: openai.OpenAI) -> None:
    long = QUESTION + " The sea was quiet, and nobody came up the stairs." * 8
    first = ask(client, long)
    again = ask(client, long)
    assert text_of(again) == text_of(first)
    details = again.usage.prompt_tokens_details
    assert details.cached_tokens > 0 and details.cached_tokens % 32 == 0
    turns = [
        {"role": "user", "content": long},
        {"role": "assistant", "content": text_of(first)},
        {"role": "user", "content": "And then?"},
    ]
    second = client.chat.completions.create(messages=turns, **GREEDY)  # type: ignore[call-overload]
    assert second.usage.prompt_tokens_details.cached_tokens >= details.cached_tokens


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "conmoe-edge"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_many_at_once_say_what_they_say_alone(server: Running, alone: dict[str, str]) -> None:
    questions = [*alone, *alone]
    with ThreadPoolExecutor(len(questions)) as pool:
        texts = list(pool.map(lambda q: text_of(ask(server.client(), q)), questions))
    assert texts == [alone[question] for question in questions]
    server.idle()
    now = server.metrics()
    assert now["conmoe_memory_bytes"] < now["conmoe_memory_budget_bytes"] + LIBRARY_SPREAD


# What is refused


def test_the_clients_error_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-4o")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as audio:
        ask(client, audio={"format": "wav", "voice": "alloy"})
    assert (audio.value.param, audio.value.code) == ("audio", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model=NAME, input="x")
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "word " * 3000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(prompt=[10**9], **GREEDY)


def test_an_answer_ends_with_the_context(client: openai.OpenAI, server: Running) -> None:
    context = server.get("/stats").json()["context"]
    reply = ask(client, "word " * (context - 60), max_tokens=500)
    assert reply.choices[0].finish_reason in ("length", "stop")
    assert reply.usage.total_tokens <= context + 1


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("GET", "/nowhere", {}, b"", 404),
        ("GET", "/page/../engine.py", {}, b"", 404),
        ("GET", "/page/engine.py", {}, b"", 404),
        ("GET", "/docs", {}, b"", 404),
        ("GET", "/v1/chat/completions", {}, b"", 405),
        ("DELETE", "/v1/models", {}, b"", 405),
        ("POST", "/v1/chat/completions", {"content-type": "text/plain"}, b"{}", 415),
        ("POST", "/v1/chat/completions", {}, b" " * (2 << 20), 413),
        ("POST", "/v1/chat/completions", {"host": "evil.example"}, b"{}", 400),
        ("GET", "/", {"host": "evil.example"}, b"", 400),
        ("POST", "/v1/chat/completions", {"origin": "https://evil.example"}, b"{}", 403),
        ("POST", "/v1/chat/completions", {"origin": "null"}, b"{}", 403),
    ],
)
def test_refusals_have_openais_shape(
    server: Running, method: str, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    if method == "POST":
        headers = {"content-type": "application/json", **headers}
    response = httpx.request(method, server.url + path, headers=headers, content=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "access-control-allow-origin" not in response.headers


def test_a_body_without_a_length_is_bounded_too(server: Running) -> None:
    def parts() -> Any:
        for _ in range(40):
            yield b" " * (64 << 10)

    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/v1/completions", headers=headers, content=parts())
    assert response.status_code == 413
    assert server.get("/health").status_code == 200


def test_a_client_that_sends_everything_first_still_reads_why_it_was_refused(
    server: Running,
) -> None:
    """Far more than the sockets' buffers hold; a connection that is closed over it would be reset."""
    address = server.url.removeprefix("http://").split(":")
    total = 40 << 20
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {total}\r\n"
    with socket.create_connection((address[0], int(address[1])), timeout=PATIENCE) as one:
        one.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n")
        for _ in range(total >> 16):
            one.sendall(b" " * (1 << 16))
        assert one.recv(1 << 10).startswith(b"HTTP/1.1 413 ")


def test_keys(strict: Running) -> None:
    assert text_of(ask(strict.client(), max_tokens=2)) is not None
    for wrong in ("wrong", KEY[:-1], KEY + "y"):
        with pytest.raises(openai.AuthenticationError):
            ask(strict.client(api_key=wrong))
    assert httpx.get(f"{strict.url}/health").status_code == 200
    assert httpx.get(f"{strict.url}/").status_code == 200
    for path in ("/metrics", "/stats", "/v1/models"):
        response = httpx.get(strict.url + path)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert strict.get(path).status_code == 200


def test_a_full_queue_says_when_to_come_again(strict: Running) -> None:
    strict.idle()
    client = strict.client()
    long = {"max_tokens": 1500, "stream": True, "temperature": 1.0}
    with strict.held():
        running = ask(client, **long)
        strict.wait_until({"conmoe_running": 1})
        waiting = ask(strict.client(), **long)
        strict.wait_until({"conmoe_running": 1, "conmoe_queue_length": 1})
        with pytest.raises(openai.RateLimitError) as caught:
            ask(strict.client())
        assert int(caught.value.response.headers["retry-after"]) >= 1
        waiting.close()
        strict.wait_until({"conmoe_running": 1, "conmoe_queue_length": 0})
        running.close()
        strict.idle()
    assert text_of(ask(client, max_tokens=4))


# Who leaves

FEW_ROUNDS = 6
"""Some tokens of ``QUESTION``'s answer, and not the 24 that it is known to have."""


@pytest.mark.parametrize("stage", ["queued", "prefill", "mid-stream", "not streaming"])
def test_who_leaves_frees_the_place(server: Running, alone: dict[str, str], stage: str) -> None:
    server.idle()
    context = server.get("/stats").json()["context"]
    cancelled = 'conmoe_answers_total{outcome="cancelled"}'
    before = server.metrics()[cancelled]
    long = "word " * (context - 300)
    with server.held(after={"queued": 0, "mid-stream": FEW_ROUNDS}.get(stage, 1)):
        if stage == "queued":  # behind one that asks for the whole context
            blocker = ask(server.client(), max_tokens=context, stream=True)
            server.wait_until({"conmoe_running": 1})
            stream = ask(server.client(), max_tokens=context, stream=True)
            server.wait_until({"conmoe_running": 1, "conmoe_queue_length": 1})
            stream.close()
            server.wait_until({"conmoe_running": 1, "conmoe_queue_length": 0})
            assert server.metrics()[cancelled] - before == 1
            blocker.close()
        elif stage == "not streaming":
            _leave_while_it_runs(server, long)
        else:
            question = long if stage == "prefill" else QUESTION
            stream = ask(server.client(), question, max_tokens=context, stream=True)
            if stage == "mid-stream":
                chunks = iter(stream)
                for _ in range(4):
                    next(chunks)
            else:
                server.wait_until({"conmoe_running": 1})
            stream.close()
        server.idle()
        assert server.metrics()[cancelled] - before == (2 if stage == "queued" else 1)
    assert text_of(ask(server.client())) == alone[QUESTION]


def _leave_while_it_runs(server: Running, question: str) -> None:
    """Ask for a whole answer, and hang up as soon as it is being made."""
    body = {"model": NAME, "messages": [{"role": "user", "content": question}], "temperature": 1.0}
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    server.wait_until({"conmoe_running": 1})
    connection.close()


def test_who_leaves_touches_nobody_else(server: Running, alone: dict[str, str]) -> None:
    server.idle()
    with ThreadPoolExecutor(1) as pool, server.held() as let_pass:
        staying = pool.submit(lambda: text_of(ask(server.client())))
        server.wait_until({"conmoe_running": 1})
        for _ in range(FEW_ROUNDS):
            stream = ask(server.client(), OTHERS[0], max_tokens=200, stream=True)
            server.wait_until({"conmoe_running": 2})
            let_pass(1)  # a few tokens of both, in each other's company
            next(chunk for chunk in stream if chunk.choices[0].delta.content)
            stream.close()
            server.wait_until({"conmoe_running": 1})
        let_pass(10**6)
        assert staying.result() == alone[QUESTION]
    server.idle()


# Health and metrics


def test_metrics_are_well_formed(server: Running, client: openai.OpenAI) -> None:
    before = server.metrics()
    usage = ask(client).usage
    server.idle()
    after = server.metrics()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["conmoe_completion_tokens_total"] == usage.completion_tokens
    assert grown["conmoe_prompt_tokens_total"] == usage.prompt_tokens
    assert grown["conmoe_first_token_seconds_count"] == 1
    asked = [f'conmoe_prototype_requests_total{{tier="{tier}"}}' for tier in ("device", "below")]
    assert sum(grown[name] for name in asked) > 0
    compute = server.get("/stats").json()["compute"]
    path = compute["fast_path"]["summary"]
    assert path and compute["fast_path"]["served"]["tokens"] > 0
    assert after[f'conmoe_compute_info{{kernel="{compute["kernel"]}",fast_path="{path}"}}'] == 1
    lines = server.get("/metrics").text.splitlines()
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    for line in lines:
        if not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            assert name in typed or name.rsplit("_", 1)[0] in typed
