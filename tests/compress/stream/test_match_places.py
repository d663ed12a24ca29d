"""Exact matches: what one pass says is what greedy generation writes, for every way of cutting words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
import torch

from conmoe_edge.compress.quality.exact_match import MatchTracker
from conmoe_edge.compress.stats.match_counts import RESULTS, WORDS, ExactMatch, matches_in
from conmoe_edge.compress.stream.calibration_text import (
    CalibrationText,
    Document,
    TokenSet,
    evaluation_set,
)
from conmoe_edge.compress.stream.match_places import MatchPlaces

DEMO = Path(__file__).resolve().parents[3] / "conmoe_edge" / "data" / "demo"
TEXT = DEMO.parent / "texts" / "heldout.txt"


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval(), AutoTokenizer.from_pretrained(DEMO)


def cut(tokenizer: Any, domain: str, tokens: int, length: int) -> TokenSet:
    parts = TEXT.read_text(encoding="utf-8").split("<|document domain=")[1:]
    chosen = [p.partition("|>\n")[2] for p in parts if p.startswith(f"{domain}|")]
    text = CalibrationText((Document(domain, "\n\n".join(chosen)),), None, "")
    return evaluation_set(text, tokenizer, length=length, tokens=tokens)


def spans(tokens: TokenSet, tokenizer: Any) -> list[tuple[int, str, int, int]]:
    """(row, kind, first token, token behind) of every item: the walk through ``_items`` in one place."""
    places = MatchPlaces(tokens, tokenizer)
    return [
        (row, item.kind, item.start, item.stop)
        for row, items in enumerate(places._items)
        for item in items
    ]


@torch.no_grad()
def test_one_pass_says_what_generation_writes(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    tokens = cut(tokenizer, "math", 384, 192)
    logits = model(input_ids=tokens.ids, use_cache=False).logits
    places = MatchPlaces(tokens, tokenizer)
    said = [
        (row, kind, left)
        for row in range(len(tokens.domains))
        for kind, left in places.written(row, logits[row].argmax(-1).tolist())
    ]
    found = spans(tokens, tokenizer)
    assert [(row, kind) for row, kind, *_ in found] == [(row, kind) for row, kind, _ in said]
    right = 0
    for (row, _, start, stop), (_, _, left) in zip(found, said, strict=True):
        wanted = tokenizer.decode(tokens.ids[row, start:stop])
        given = tokens.ids[row : row + 1, :start]
        mask = torch.ones_like(given)
        out = model.generate(
            given, attention_mask=mask, max_new_tokens=stop - start + 1, do_sample=False
        )[0, start:]
        written = tokenizer.decode(out)
        exact = written.startswith(wanted) and not written[len(wanted) : len(wanted) + 1].isalnum()
        assert exact == (left is None), (wanted, written)
        right += exact
    kinds = {kind for _, kind, *_ in found}
    assert kinds == {WORDS, RESULTS} and 3 <= right < len(found) > 60


@torch.no_grad()
def test_a_broken_model_writes_less_and_the_same_model_the_same(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    tokens = cut(tokenizer, "math", 1536, 512)
    whole = model(input_ids=tokens.ids, use_cache=False).logits
    weights = [layer.mlp.experts.down_proj for layer in model.model.layers]
    for one in weights:
        one.data.neg_()
    broken = model(input_ids=tokens.ids, use_cache=False).logits
    for one in weights:
        one.data.neg_()

    def counted(ours: torch.Tensor) -> dict[str, ExactMatch]:
        tracker = MatchTracker(MatchPlaces(tokens, tokenizer))
        for row in range(len(tokens.domains)):
            tracker.add(row, ours[row], whole[row])
        return tracker.result()

    same, less = counted(whole), counted(broken)
    assert same == counted(whole) and list(same) == [WORDS, RESULTS]
    for one in same.values():
        assert one.items == one.same and one.right == one.reference_right == one.both_right
        assert one.difference is not None and one.difference[0] == 0 < one.difference[1]
    words = less[WORDS]
    assert words.difference is not None and words.same is not None
    assert words.difference[0] + words.difference[1] < 0 and words.same < words.items


@pytest.mark.parametrize("kind", ["byte-bpe", "bytes-behind", "unigram"])
def test_items_are_whole_words_however_they_are_cut(kind: str) -> None:
    tokenizer = small_tokenizers.make(kind, begins=False)
    text = "The keeper wrote naïve letters: 12*3 = 36, then 40 =7x and x = 5. Ärger im Süden, a rock_sea."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    tokens = TokenSet(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), ("text",))
    found = [
        (what, tokenizer.decode(ids[start:stop]).strip())
        for _, what, start, stop in spans(tokens, tokenizer)
    ]
    # A vocabulary may have the end of a word and the space behind it in one token, and letters in two halves.
    certain = {"keeper", "wrote", "letters", "then"}
    words = {word for what, word in found if what == WORDS}
    assert words <= {*certain, "naïve", "Ärger", "Süden"} and "letters" in words
    results = [word for what, word in found if what == RESULTS]
    if kind == "byte-bpe":
        assert words >= certain and results == ["36"]
    else:
        assert results in ([], ["36"])


def test_padding_has_no_items(demo: tuple[Any, Any]) -> None:
    tokenizer = demo[1]
    ids = torch.tensor([tokenizer("Nobody knew who lit the lighthouse before.").input_ids])
    mask = torch.ones_like(ids, dtype=torch.bool)
    every = spans(TokenSet(ids, mask, ("text",)), tokenizer)
    mask[:, every[-1][2] :] = False
    assert spans(TokenSet(ids, mask, ("text",)), tokenizer) == every[:-1]


def test_the_interval_is_that_of_all_outcomes() -> None:
    """95 % intervals cover a true difference of nothing about as often as they say, also for a dozen items."""

    def outcomes(items: int) -> Iterator[tuple[float, ExactMatch]]:
        """Every (gained, lost) of ``items``, each gained or lost with probability 0.1, and its probability."""
        from math import comb

        for gained, lost in itertools.product(range(items + 1), repeat=2):
            if gained + lost <= items:
                ways = comb(items, gained) * comb(items - gained, lost)
                chance = ways * 0.1 ** (gained + lost) * 0.8 ** (items - gained - lost)
                yield chance, ExactMatch(items, gained, lost, 0, 0)

    for items in (12, 60):
        covered = 0.0
        for chance, one in outcomes(items):
            assert one.difference is not None
            covered += chance * (abs(one.difference[0]) <= one.difference[1])
        assert 0.94 < covered < 0.995


def test_a_receipt_with_odd_counts_is_read_as_far_as_it_goes() -> None:
    row = {"items": 4, "right": 1, "reference_right": 2, "both_right": 1, "same": 3}
    kept = {"words": row, "results": {**row, "items": 0}}
    assert matches_in({"exact_match": kept}) == {WORDS: ExactMatch(4, 1, 2, 1, 3)}
    for odd in ({}, {"exact_match": 7}, {"exact_match": {"words": {**row, "right": "1"}}}):
        assert matches_in(odd) == {}
