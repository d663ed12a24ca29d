"""The bound on tokens, against tokenizers as models have them: it never says more than there are."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conmoe_edge.serve.fewest_tokens import FewestTokens, fewest_tokens

DATA = Path(__file__).parents[2] / "conmoe_edge" / "data"
_QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = ("demo", "gpt2", "qwen", "llama", "gemma", "strips")
UNKNOWN_KINDS = ("unigram", "lowercase", "drops blanks", "no bytes", "words")


@cache
def tokenizer(kind: str) -> Any:
    """A tokenizer of this kind, trained on a little text where it does not ship."""
    if kind == "demo":
        return AutoTokenizer.from_pretrained(DATA / "demo")
    made = Tokenizer(models.BPE(byte_fallback=kind in ("llama", "gemma"), fuse_unk=True))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in ("gpt2", "strips"):
        made.pre_tokenizer = level
    elif kind == "qwen":
        made.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(_QWEN), "isolated")
        bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, bare])
    elif kind == "llama":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        alphabet = []
    elif kind == "gemma":
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet = []
    elif kind == "lowercase":
        made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), level
    elif kind == "drops blanks":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), level])
    elif kind == "no bytes":
        alphabet = []
    special = [f"<0x{n:02X}>" for n in range(256)] if kind in ("llama", "gemma") else ["<s>"]
    text = (DATA / "texts" / "calibration.txt").read_text(encoding="utf-8")[:60_000]
    text += "    " * 200 + "====" * 100 + "漢字仮名交じり文" * 20 + "\u1f82\uac01" * 20
    trainer: Any = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    if kind == "unigram":
        made = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0))
    elif kind == "words":
        made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    else:
        made.train_from_iterator(text.splitlines(keepends=True), trainer)
    if kind in ("llama", "gemma"):  # bytes are tokens of the model, and not found in texts
        made = _without_added(made)
    if kind == "strips":
        made.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def _without_added(made: Tokenizer) -> Tokenizer:
    described = json.loads(made.to_str())
    described["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(described))


@cache
def bound(kind: str) -> FewestTokens:
    return fewest_tokens(tokenizer(kind))


@cache
def vocabulary(kind: str) -> list[str]:
    made = tokenizer(kind)
    return [made.decode([n]) for n in range(len(made))]


texts = st.text() | st.text(
    st.sampled_from(" \t\n=-ae\u0301\u0323\u1100\u1161\u11a8漢<mask>\u2126")
)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_fewer_tokens_than_the_bound(kind: str) -> None:
    """A text made of any characters, of the vocabulary's own tokens, and of one token again and again."""
    made, fewest, words = tokenizer(kind), bound(kind), vocabulary(kind)
    assert fewest.weights is not None

    @settings(max_examples=150, deadline=None)
    @given(st.lists(texts | st.sampled_from(words), max_size=8), st.integers(1, 40))
    def check(parts: list[str], times: int) -> None:
        text = "".join(parts) * times
        ids = made(text, add_special_tokens=False).input_ids
        assert fewest.of(text) <= len(ids), (kind, text)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_by_itself_is_within_the_bound(kind: str) -> None:
    made, fewest = tokenizer(kind), bound(kind)
    for word in vocabulary(kind):
        for text in (word, word * 50):
            assert fewest.of(text) <= len(made(text, add_special_tokens=False).input_ids), word


def test_the_bound_says_something() -> None:
    """English comes to an eighth of its tokens or more, and a MiB of it is known not to fit."""
    text = (DATA / "texts" / "calibration.txt").read_text(encoding="utf-8")[:20_000]
    for kind in ("demo", "gpt2", "qwen", "llama"):
        there = len(tokenizer(kind)(text).input_ids)
        assert bound(kind).of(text) > there / 8, kind
        assert bound(kind).longest is not None
        assert bound(kind).of(" " * (bound(kind).longest or 0) * 100) >= 100 / 3


@pytest.mark.parametrize("kind", UNKNOWN_KINDS)
def test_of_what_is_not_understood_nothing_is_said(kind: str) -> None:
    assert bound(kind).weights is None and bound(kind).longest is None
    assert bound(kind).of("x" * 1000) == 0


def test_blanks_that_a_token_takes_with_it_count_nothing() -> None:
    assert bound("strips").of(" " * 1000) == 0 and bound("strips").longest is None
    assert bound("strips").of("word " * 1000) > 0
