"""The next token: penalties, bias, filters, log-probabilities, grammars and the end of reasoning, on small scores."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conmoe_edge.errors import CheckpointError, UsageError
from conmoe_edge.offload.generation.grammar import GrammarMaker
from conmoe_edge.offload.generation.sampling import Sampler
from conmoe_edge.offload.generation.sampling_settings import GREEDY, SamplingSettings
from conmoe_edge.offload.generation.thinking import ThinkingMarks
from tests.small_tokenizers import make

SCORES = torch.tensor([[1.0, 4.0, 3.0, 2.5, -1.0]])


def greedy(**more: Any) -> Sampler:
    plain = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    return Sampler(SamplingSettings(**{**plain, "min_p": 0.0, **more}))


def drawn(settings: SamplingSettings, scores: Tensor, times: int) -> set[int]:
    sampler = Sampler(settings)
    return {sampler.next([0], scores) for _ in range(times)}


def test_penalties_are_openais() -> None:
    """c times there already: the score loses c * frequency, and presence once. The prompt does not count."""
    sampler = greedy(frequency_penalty=0.75, presence_penalty=0.5)
    made, times, expected = [], dict.fromkeys(range(5), 0), []
    for _ in range(12):
        lost = {t: 0.75 * c + 0.5 * (c > 0) for t, c in times.items()}
        best = max(times, key=lambda t: (float(SCORES[0, t]) - lost[t], -t))
        expected.append(best)
        times[best] += 1
        made.append(sampler.next([1, 1, 1, *made], SCORES))
    assert made == expected
    assert len(set(made)) > 2


def test_a_bias_bans_and_forces() -> None:
    assert greedy(logit_bias=((1, -100.0),)).next([0], SCORES) == 2
    assert greedy(logit_bias=((4, 100.0), (1, -1.5))).next([0], SCORES) == 4
    assert greedy(logit_bias=((1, -1.25),)).next([0], SCORES) == 2
    banned = SamplingSettings(1, 1.0, 1.0, 0, 1.0, 3, (), 0.0, logit_bias=((1, -100.0),))
    assert drawn(banned, SCORES, 200) == {0, 2, 3, 4}


def test_min_p_leaves_out_what_is_less_likely_than_a_share_of_the_best() -> None:
    chances = torch.softmax(SCORES[0], 0)
    share = float(chances[3] / chances[1]) * 0.999
    settings = SamplingSettings(1, 1.0, 1.0, 0, 1.0, 5, (), share)
    assert drawn(settings, SCORES, 300) == {1, 2, 3}
    every = SamplingSettings(1, 1.0, 1.0, 0, 1.0, 5, (), 0.0)
    assert drawn(every, SCORES, 2000) == {0, 1, 2, 3, 4}


def test_scores_are_the_models_own_whatever_changes_the_choice() -> None:
    sampler = greedy(logprobs=3, logit_bias=((0, 50.0),), repetition_penalty=1.3)
    assert sampler.next([1], SCORES) == 0
    found = sampler.latest
    assert found is not None
    expected = torch.log_softmax(SCORES[0], 0)
    assert found.token == 0 and math.isclose(found.logprob, float(expected[0]), rel_tol=1e-6)
    assert list(found.likeliest) == [1, 2, 3]
    assert torch.allclose(torch.tensor(list(found.logprobs)), expected[[1, 2, 3]])
    none = greedy(logprobs=0)
    none.next([1], SCORES)
    assert none.latest is not None and not none.latest.likeliest
    assert greedy(logprobs=20).next([1], SCORES) == 1  # there are only five


def test_wishes_that_ask_for_nothing_change_no_bit() -> None:
    torch.manual_seed(1)
    scores = torch.randn(50, 1, 300)
    plain, wishing = Sampler(GREEDY), greedy(logprobs=5, logit_bias=((299, 0.0),))
    for one in scores:
        assert plain.next([3], one) == wishing.next([3], one) == int(one.argmax())
    with pytest.raises(CheckpointError, match="NaN"):
        plain.next([3], torch.full((1, 5), torch.nan))


# Held to a grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer"},
        "kind": {"enum": ["river", "sea"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make("byte-bpe")


@pytest.fixture(scope="module")
def maker(tokenizer: Any) -> GrammarMaker:
    return GrammarMaker(tokenizer, len(tokenizer) + 30, [tokenizer.eos_token_id])


def answered(sampler: Sampler, tokenizer: Any, rows: int, seed: int, most: int = 400) -> list[int]:
    """The answer of a model that knows nothing at all."""
    draw = torch.Generator().manual_seed(seed)
    made: list[int] = []
    while len(made) < most:
        token = sampler.next([5, *made], torch.randn(1, rows, generator=draw))
        if token == tokenizer.eos_token_id:
            return made
        made.append(token)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_noise_held_to_a_schema_is_of_the_schema(
    maker: GrammarMaker, tokenizer: Any, temperature: float
) -> None:
    grammar = maker.json_schema(SCHEMA)
    seen = set()
    for seed in range(6):
        settings = SamplingSettings(400, temperature, 1.0, 0, 1.0, seed, (), 0.0, grammar=grammar)
        made = answered(Sampler(settings), tokenizer, len(tokenizer) + 30, seed)
        value = json.loads(tokenizer.decode(made))
        assert set(value) == {"name", "count", "kind"} and value["kind"] in ("river", "sea")
        assert isinstance(value["count"], int) and len(value["name"]) <= 8
        seen.add(json.dumps(value))
    assert len(seen) == 6  # each answer has a rule of its own


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ."not"'),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "http://127.0.0.1/x"}, "does not fetch"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "#"}, "NoExtension"),
        (False, "not"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(
    maker: GrammarMaker, schema: Any, why: str
) -> None:
    with pytest.raises(UsageError, match=r"cannot (be enforced|go on)") as caught:
        maker.json_schema(schema)
    assert re.search(why, caught.value.why)


def test_schemas_without_end_are_refused(maker: GrammarMaker) -> None:
    deep: Any = {}
    for _ in range(100):
        deep = {"properties": {"a": deep}}
    with pytest.raises(UsageError, match="too deeply"):
        maker.json_schema(deep)
    with pytest.raises(UsageError, match="too long"):
        maker.json_schema({"enum": ["x" * 1000 + str(n) for n in range(400)]})


def test_reasoning_is_free_and_the_answer_is_not(maker: GrammarMaker, tokenizer: Any) -> None:
    """Before its end mark a model may think what it wants; the schema begins behind it."""
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    rows = len(tokenizer) + 30
    marks = ThinkingMarks(begin, end, started=True, budget=15)
    grammar = maker.json_schema(SCHEMA)
    settings = SamplingSettings(
        400,
        0.0,
        1.0,
        0,
        1.0,
        1,
        (),
        0.0,
        grammar=grammar,
        thinking=marks,
        logit_bias=((end, -100.0), (tokenizer.eos_token_id, -9.0)),
    )
    sampler = Sampler(settings)
    made = answered(sampler, tokenizer, rows, 4)
    assert made.index(end) == sampler.thought == 15  # forced, against its bias
    json.loads(tokenizer.decode(made[16:]))


def test_an_answer_that_has_to_come_does_not_end_in_its_reasoning(
    maker: GrammarMaker, tokenizer: Any
) -> None:
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    marks = ThinkingMarks(begin, end, started=True)
    plain = SamplingSettings(99, 0.0, 1.0, 0, 1.0, 1, (), 0.0, thinking=marks)
    held = replace(plain, grammar=maker.json_schema({"type": "string"}))
    scores = torch.zeros(1, len(tokenizer))
    scores[0, tokenizer.eos_token_id], scores[0, end] = 9.0, 8.0
    assert Sampler(plain).next([5], scores) == tokenizer.eos_token_id
    assert Sampler(held).next([5], scores) == end


def test_reasoning_may_begin_with_the_answer_alone(maker: GrammarMaker, tokenizer: Any) -> None:
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    grammar = maker.json_schema({"type": "string"})
    settings = SamplingSettings(
        99, 0.0, 1.0, 0, 1.0, 1, (), 0.0, grammar=grammar, thinking=ThinkingMarks(begin, end)
    )
    sampler, scores = Sampler(settings), torch.zeros(1, len(tokenizer))
    scores[0, begin] = 9.0
    assert sampler.next([5], scores) == begin
    scores[0, end] = 10.0
    assert sampler.next([5, begin], scores) == end
    assert tokenizer.decode([sampler.next([5, begin, end], scores)]).startswith('"')
    assert sampler.thought == 0
