"""Tokenizers in GGUF: llama.cpp cuts texts into the same tokens, or the tokenizer is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from families import tiny_config
from llama import ask, needs_llama
from small_tokenizers import make
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.export.llama.architectures import architecture_of
from conmoe_edge.export.llama.gguf_file import open_writer
from conmoe_edge.export.llama.pre_tokenizers import KNOWN
from conmoe_edge.export.llama.vocabulary import vocabulary_of

TEXTS = [
    "The river runs to the SEA; McDonald's HTTPServer isn't wide, I've SEEN it, WE'LL go 'round.",
    "1 22 333 4444 55555 3.14 1,000,000 x9y99z ½ Ⅻ",
    "\n\n  Blank lines\r\n\tand tabs \u00e9\u00fc\u00df \u4e2d\u6587\u5b57 \u0440\u0443\u0441\u0441\u043a",
    "def f(x):\n    return {'a': [1, 2], \"b\": x[0]}  # --> != === ...!!! ??\n\n\n",
    "\U0001f680\U0001f636\u200d\U0001f32b\ufe0f  (emoji) \u201cquotes\u201d \u2014 dash/slash\\back  trailing   ",
]
MARKS = [
    "\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0440\u0443\u0441\u0421\u041a\u0438\u0439 caf\u00e9BAR",
]
"""Words with combining marks, and with capitals of another alphabet inside."""


def bytes_tokenizer(steps: tuple[str, ...], *, whole_words: bool = False) -> Any:
    """Byte-level BPE that cuts by the patterns, one after the other."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = make("byte-bpe").backend_tokenizer.decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def written(tokenizer: Any, path: Path, pre: str | None = None) -> Path:
    """A file that holds a vocabulary and nothing else worth mentioning."""
    config = tiny_config("olmoe", vocab_size=1024, num_key_value_heads=4)
    architecture = architecture_of(config)
    writer = open_writer(path, architecture)
    architecture.add_fields(writer, config)
    vocabulary_of(tokenizer, 1024, None, pre).add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@needs_llama
@pytest.mark.parametrize("known", KNOWN, ids=[one.name for one in KNOWN])
def test_every_name_cuts_as_its_patterns_do(known: Any, tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer(known.steps, whole_words=known.whole_words)
    path = written(tokenizer, tmp_path / "v.gguf")
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == known.name
    texts = TEXTS if known.inexact else [*TEXTS, *MARKS]
    answer = ask(path, vocabulary=True, texts=texts)
    assert answer["texts"] == [tokens(tokenizer, text) for text in texts]
    assert (answer["begins"], answer["eos"]) == (False, tokenizer.eos_token_id)


@needs_llama
def test_a_tokenizer_that_begins_texts(tmp_path: Path) -> None:
    answer = ask(written(make("byte-bpe"), tmp_path / "v.gguf"), vocabulary=True, texts=TEXTS)
    assert answer["begins"] and answer["eos"] == make("byte-bpe").eos_token_id
    assert answer["texts"] == [tokens(make("byte-bpe"), text) for text in TEXTS]


def changed(change: Any) -> Any:
    """``byte-bpe`` with a change in its ``tokenizer.json``."""
    found = json.loads(make("byte-bpe").backend_tokenizer.to_str())
    change(found)
    tokenizer = Tokenizer.from_str(json.dumps(found))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes-behind", "unigram", "wordpiece", "words"])
def test_other_kinds_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match="not written as GGUF"):
        vocabulary_of(make(kind), 1024, None)


def test_a_way_of_cutting_without_a_name_is_refused_unless_it_is_said() -> None:
    tokenizer = bytes_tokenizer((r"\p{L}+|[^\p{L}]",))
    with pytest.raises(UnsupportedModel, match="cut texts otherwise") as caught:
        vocabulary_of(tokenizer, 1024, None)
    assert "--pre-tokenizer" in caught.value.fix
    assert vocabulary_of(tokenizer, 1024, None, "gpt-2").pre == "gpt-2"


def test_what_llama_does_not_do_to_texts_is_refused() -> None:
    def lower(found: Any) -> None:
        found["normalizer"] = {"type": "Lowercase"}

    with pytest.raises(UnsupportedModel, match="Lowercase"):
        vocabulary_of(changed(lower), 1024, None)
    with pytest.raises(UnsupportedModel, match="token that ends an answer"):
        tokenizer = make("byte-bpe").backend_tokenizer
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 1024, None)


def test_whole_words_that_no_merges_give_are_refused() -> None:
    """``gpt-2`` does not take them whole; where merges give every token, that is the same."""

    def whole(found: Any) -> None:
        found["model"]["ignore_merges"] = True

    def one_more(found: Any) -> None:
        whole(found)
        found["model"]["vocab"]["zzqq"] = 1000

    assert vocabulary_of(changed(whole), 1024, None).pre == "gpt-2"
    with pytest.raises(UnsupportedModel, match="does not take words that are tokens whole"):
        vocabulary_of(changed(one_more), 1024, None)
