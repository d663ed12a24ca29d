"""Noise held to the grammar of each form is a call of that form: the reader finds it, and its arguments fit."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers import AddedToken

from conmoe_edge.offload.generation.answer_parts import Called, MarkedReader, Said, Thought
from conmoe_edge.offload.generation.detokenize import TextStream
from conmoe_edge.offload.generation.grammar import GrammarMaker
from conmoe_edge.offload.generation.harmony_parts import HarmonyReader
from conmoe_edge.offload.generation.sampling import Sampler
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.tool_forms import (
    FORMS,
    HARMONY,
    MISTRAL_ARGS,
    ToolForm,
    calls_grammar,
    speller,
)
from tests.small_tokenizers import make

MARKS = (
    "[TOOL_CALLS]", "[ARGS]", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|channel|>",
    "<|message|>", "<|constrain|>", "<|call|>", "<|start|>", "<|end|>",
)  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "count": {"type": "integer", "minimum": 0, "maximum": 99},
                    "kind": {"type": "string", "enum": ["river", "sea"]},
                    "note": {"type": "string", "maxLength": 5},
                },
                "required": ["count", "kind"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("look_up", "note.down")
]


PLAIN_MARKS = ("<tool_call>", "</tool_call>")
"""Of Qwen and Hermes: tokens of their own that are not special, and in other tokenizers none at all."""


@pytest.fixture(scope="module", params=["with plain marks", "without"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    found = copy.deepcopy(make("byte-bpe"))
    found.add_special_tokens({"additional_special_tokens": [*MARKS]})
    if request.param != "without":
        found.add_tokens([AddedToken(mark, special=False) for mark in PLAIN_MARKS])
    return found


def answer(tokenizer: Any, text: str, seed: int, shown: frozenset[int], most: int = 600) -> str:
    """What a model that knows nothing says, held to a grammar: its text, with the marks."""
    rows = len(tokenizer)
    plain = [n for text, n in tokenizer.get_added_vocab().items() if text in PLAIN_MARKS]
    grammar = GrammarMaker(tokenizer, rows, [tokenizer.eos_token_id]).lark(text)
    settings = SamplingSettings(most, 0.0, 1.0, 0, 1.0, seed, (), 0.0, grammar=grammar)
    sampler, stream = Sampler(settings), TextStream(tokenizer, shown)
    draw = torch.Generator().manual_seed(seed)
    said, made = "", []
    while len(made) < most:
        scores = torch.randn(1, rows, generator=draw)
        scores[0, [*sorted(shown), *plain]] += 3.0  # or it would take long until a mark comes
        scores[0, tokenizer.convert_tokens_to_ids(["\u010a", ",", "</s>"])] += 3.0
        scores[0, tokenizer.convert_tokens_to_ids("<")] += 6.0
        token = sampler.next([5, *made], scores)
        if token == tokenizer.eos_token_id:
            return said + stream.finish()
        made.append(token)
        said += stream.add(token)
    raise AssertionError(f"it never ends: {len(said)} calls, ...{said[-300:]}")


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
def test_noise_becomes_calls(tokenizer: Any, form: ToolForm) -> None:
    added = tokenizer.added_tokens_decoder.items()
    shown = frozenset(n for n, token in added if token.special) - {tokenizer.eos_token_id}
    names, most = set(), 0
    for seed in range(10):
        several = seed % 2 == 1
        grammar = calls_grammar(form, TOOLS, speller(tokenizer), several=several)
        text = answer(tokenizer, grammar, seed, shown, 3000)
        marks = None if form.marks is None else form.marks(TOOLS)
        reader = HarmonyReader() if marks is None else MarkedReader(None, marks)
        parts = [*reader.add(text), *reader.finish()]
        calls = [part for part in parts if isinstance(part, Called)]
        if form is not HARMONY:
            assert not [part for part in parts if isinstance(part, (Said, Thought))], text
        assert calls and (several or len(calls) == 1), text
        most = max(most, len(calls))
        for call in calls:
            given = json.loads(call.arguments)
            names.add(call.name)
            assert set(given) - {"note"} == {"count", "kind"}, text
            assert isinstance(given["count"], int) and given["kind"] in ("river", "sea")
    assert names <= {"look_up", "note.down"}
    assert most > 1 or form in (HARMONY, MISTRAL_ARGS)
