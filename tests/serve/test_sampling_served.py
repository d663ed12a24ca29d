"""What all others have, asked by the real client: log-probabilities, several answers, several prompts, bias, penalties,
names and origins."""

from __future__ import annotations

import math
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import KEY, NAME, Running

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a short story about a lighthouse."}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 10}
PROMPTS = ["The river runs", "A boat on the sea", "Once upon a time"]


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(messages=QUESTION, **{**GREEDY, **more})


def test_log_probabilities_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = ask(client, logprobs=True, top_logprobs=3)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens == 10
    assert (
        b"".join(bytes(one.bytes) for one in entries).decode() == whole.choices[0].message.content
    )
    for one in entries:
        best = [top.logprob for top in one.top_logprobs]
        assert one.token == one.top_logprobs[0].token and best == sorted(best, reverse=True)
        assert 0 < sum(map(math.exp, best)) <= 1 + 1e-6 and len(best) == 3
    chunks = list(ask(client, logprobs=True, top_logprobs=3, stream=True))
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == entries
    assert ask(client).choices[0].logprobs is None
    text = client.completions.create(prompt=PROMPTS[0], logprobs=2, **GREEDY).choices[0]
    scores = text.logprobs
    assert scores is not None and scores.text_offset is not None and scores.tokens is not None
    assert "".join(scores.tokens) == text.text and len(scores.top_logprobs or ()) == 10
    assert scores.text_offset[3] == len("".join(scores.tokens[:3]))


def test_several_answers(client: openai.OpenAI) -> None:
    alone = ask(client)
    reply = ask(client, n=3)
    assert [one.index for one in reply.choices] == [0, 1, 2]
    assert {one.message.content for one in reply.choices} == {alone.choices[0].message.content}
    assert reply.usage.prompt_tokens == alone.usage.prompt_tokens
    assert reply.usage.completion_tokens == 3 * alone.usage.completion_tokens
    drawn = [ask(client, n=3, temperature=1.0, seed=7) for _ in range(2)]
    texts = [[one.message.content for one in reply.choices] for reply in drawn]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    one = ask(client, temperature=1.0, seed=8)
    assert one.choices[0].message.content == texts[0][1]
    parts = ["", "", ""]
    usage = None
    more = {"stream": True, "stream_options": {"include_usage": True}, "n": 3}
    for chunk in ask(client, temperature=1.0, seed=7, **more):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == texts[0] and usage == drawn[0].usage
    with pytest.raises(openai.BadRequestError, match="At most 34 answers"):
        ask(client, n=35)


def test_several_prompts_and_echo(client: openai.OpenAI) -> None:
    alone = [
        client.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in PROMPTS
    ]
    for given in (PROMPTS, [ids_of(client, prompt) for prompt in PROMPTS]):
        reply = client.completions.create(prompt=given, **GREEDY)
        assert [choice.text for choice in reply.choices] == alone
    echoed = client.completions.create(prompt=PROMPTS, echo=True, n=2, **GREEDY)
    expected = [p + text for p, text in zip(PROMPTS, alone, strict=True) for _ in range(2)]
    assert [choice.text for choice in echoed.choices] == expected
    assert [choice.index for choice in echoed.choices] == list(range(6))
    parts = [""] * 3
    for chunk in client.completions.create(prompt=PROMPTS, echo=True, stream=True, **GREEDY):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == expected[::2]


def ids_of(client: openai.OpenAI, text: str) -> list[int]:
    root = str(client.base_url).removesuffix("v1/")
    return httpx.post(f"{root}tokenize", json={"content": text}).json()["tokens"]


def test_tokens_of_a_text_and_back(client: openai.OpenAI, server: Running) -> None:
    tokens = ids_of(client, PROMPTS[0])
    usage = client.completions.create(prompt=PROMPTS[0], **GREEDY).usage
    assert usage is not None and len(tokens) == usage.prompt_tokens
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}).json()
    assert back["content"] == PROMPTS[0]
    counted = httpx.post(f"{server.url}/tokenize", json={"messages": QUESTION}).json()
    assert counted["count"] == ask(client).usage.prompt_tokens
    assert counted["max_model_len"] == 2048
    for wrong in ({}, {"content": 5}, {"messages": "x"}):
        assert httpx.post(f"{server.url}/tokenize", json=wrong).status_code == 400
    for wrong in ({}, {"tokens": [10**9]}, {"tokens": ["a"]}):
        assert httpx.post(f"{server.url}/detokenize", json=wrong).status_code == 400


def test_bias_and_penalties_change_the_answer(client: openai.OpenAI) -> None:
    plain = ask(client, logprobs=True).choices[0]
    first = ids_of(client, plain.logprobs.content[0].token)[-1]
    banned = ask(client, logit_bias={str(first): -100}, logprobs=True).choices[0]
    assert banned.logprobs.content[0].token != plain.logprobs.content[0].token
    forced = ask(client, logit_bias={"500": 100}, logprobs=True).choices[0]
    assert len({one.token for one in forced.logprobs.content}) == 1
    mixed = ask(
        client, logit_bias={"500": 100}, frequency_penalty=2, presence_penalty=2, max_tokens=60
    )
    assert mixed.usage.completion_tokens > 45  # a hundred is used up after some fifty times
    assert mixed.choices[0].message.content != forced.message.content * 6
    repeats = {"extra_body": {"repeat_penalty": 1.5}}
    assert ask(client, **repeats).choices[0].message.content != plain.message.content
    with pytest.raises(openai.BadRequestError, match="Tokens are numbers"):
        ask(client, logit_bias={"99999": 1})
    narrow = {"temperature": 1.0, "seed": 1, "extra_body": {"min_p": 1.0}}
    assert ask(client, **narrow).choices[0].message.content == plain.message.content


def test_names_and_unknown_fields_are_said(client: openai.OpenAI, strict: Running) -> None:
    raw = client.chat.completions.with_raw_response.create(
        messages=QUESTION,
        **{**GREEDY, "model": "gpt-4o", "extra_body": {"temprature": 1, "keep_alive": "5m"}},
    )
    assert raw.headers["x-conmoe-ignored"] == "temprature"
    assert raw.headers["x-conmoe-model"] == f"{NAME} (not gpt-4o)"
    assert raw.parse().model == NAME
    assert (
        "x-conmoe-model"
        not in client.chat.completions.with_raw_response.create(messages=QUESTION, **GREEDY).headers
    )
    other = strict.client()
    assert [one.id for one in other.models.list()] == [NAME, "gpt-local"]
    assert ask(other, model="gpt-local", max_tokens=1).model == NAME
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        ask(other, model="gpt-4o")
    with pytest.raises(openai.BadRequestError, match="temprature"):
        ask(other, extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError, match="At most 1 answers"):
        ask(other, n=2)


def test_pages_of_an_allowed_site(strict: Running) -> None:
    ours, theirs = "https://ours.example", "https://theirs.example"
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    path = f"{strict.url}/v1/chat/completions"
    allowed = httpx.options(path, headers={"Origin": ours, **asks})
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == ours
    assert allowed.headers["access-control-allow-headers"] == "authorization"
    refused = httpx.options(path, headers={"Origin": theirs, **asks})
    assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
    key = {"Authorization": f"Bearer {KEY}"}
    models = f"{strict.url}/v1/models"
    assert httpx.get(models, headers={"Origin": ours}).status_code == 401
    answer = httpx.get(models, headers={"Origin": ours, **key})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ours)
    assert httpx.get(models, headers={"Origin": theirs, **key}).status_code == 403
    assert httpx.get(models, headers={"x-api-key": KEY}).status_code == 200
    assert httpx.get(models, headers={"x-api-key": "wrong"}).status_code == 401
