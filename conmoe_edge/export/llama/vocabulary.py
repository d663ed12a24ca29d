"""A model's tokenizer as the fields of a GGUF file.

What transformers made of the tokenizer's files is asked (``model/tokenizers.py`` opened them), not the files. Only
byte-level byte-pair encoding is written; other kinds are refused by name. Peak memory: the tokenizer as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.export.llama.pre_tokenizers import PreTokenizer, names_of, unknown

_OTHER = "--format hf writes a plain checkpoint with the tokenizer as it is"
_NORMALIZERS = (None, "NFC")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Attributes:
    pre: llama.cpp's name of the pre-tokenizer.
    inexact: which texts llama.cpp cuts otherwise all the same.
    tokens: the text of every token; ids that stand for nothing have a name only.
    kinds: what each token is.
    merges: pairs of pieces, the first ones first.
    special: ``bos``, ``eos``, ``unk``, ``pad`` -> the id, where there is one.
    begins, ends: whether a text gets the first or the last token put beside it.
    template: the chat template, or several by name; empty where there is none.
    """

    pre: str
    inexact: str
    tokens: Sequence[str]
    kinds: Sequence[gguf.TokenType]
    merges: Sequence[str]
    special: Mapping[str, int]
    begins: bool
    ends: bool
    template: str | Mapping[str, str]

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write its fields."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        writer.add_token_merges(list(self.merges))
        adders = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
        }
        for name, number in self.special.items():
            adders[name](number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if isinstance(self.template, str):
            if self.template:
                writer.add_chat_template(self.template)
        else:
            writer.add_chat_template(
                [{"name": name, "template": text} for name, text in self.template.items()]
            )


def vocabulary_of(tokenizer: Any, size: int, end: int | None, pre: str | None = None) -> Vocabulary:
    """The vocabulary of a model.

    Args:
        tokenizer: as ``load_tokenizer`` gives it.
        size: rows of the embedding.
        end: the token that ends an answer, where the tokenizer names none.
        pre: llama.cpp's name of the pre-tokenizer, where somebody knows it.

    Raises:
        UnsupportedModel: llama.cpp cannot do what the tokenizer does; says what that is.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _other_kind("it is no tokenizer of the tokenizers library")
    found = json.loads(backend.to_str())
    model = found["model"]
    _check_kind(found, model)
    cut = PreTokenizer(pre, ()) if pre else _pre_tokenizer(found, type(backend))
    special = {
        kind: number
        for kind in ("bos", "eos", "unk", "pad")
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None
    }
    if "eos" not in special:
        if end is None:
            raise UnsupportedModel(
                "The tokenizer names no token that ends an answer.",
                "llama.cpp would take token 11 for it",
                "put eos_token into the package's tokenizer_config.json",
            )
        special["eos"] = end
    begins, ends = _added(tokenizer, special)
    tokens, kinds = _tokens(model["vocab"], found.get("added_tokens") or (), size)
    return Vocabulary(
        cut.name,
        cut.inexact,
        tokens,
        kinds,
        [one if isinstance(one, str) else " ".join(one) for one in model["merges"]],
        special,
        begins,
        ends,
        tokenizer.chat_template or "",
    )


def _check_kind(found: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Byte-level byte-pair encoding and nothing beside it."""
    if model.get("type") != "BPE":
        raise _other_kind(f"its model is {model.get('type')}")
    decoder = (found.get("decoder") or {}).get("type")
    if model.get("byte_fallback") or decoder != "ByteLevel":
        raise _other_kind("its tokens are no bytes (SentencePiece, by the look of it)")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _other_kind(f"its {name} is {model[name]!r}")
    normalizer = (found.get("normalizer") or {}).get("type")
    if normalizer not in _NORMALIZERS:
        raise _other_kind(f"it normalises texts by {normalizer}, and llama.cpp does not")


def _other_kind(why: str) -> UnsupportedModel:
    return UnsupportedModel("This tokenizer is not written as GGUF.", why, _OTHER)


def _pre_tokenizer(found: Mapping[str, Any], kind: Any) -> PreTokenizer:
    """The pre-tokenizer; where it differs from the model in taking whole words, the merges have to give them too.

    Args:
        found: ``tokenizer.json``.
        kind: the class of the tokenizer.
    """
    known, model = names_of(found), found["model"]
    whole = bool(model.get("ignore_merges"))
    for one in known:
        if one.whole_words == whole:
            return one
    merging = {**found, "model": {**model, "ignore_merges": False}}
    plain = kind.from_str(json.dumps(merging)).model
    if any(len(plain.tokenize(token)) != 1 for token in model["vocab"]):
        raise unknown(
            f"llama.cpp's {known[0].name} {'takes' if known[0].whole_words else 'does not take'} words that are tokens "
            "whole, and this tokenizer is the other way, with tokens that no merges give"
        )
    return known[0]


def _added(tokenizer: Any, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first token before a text, and its last one behind.

    Raises:
        UnsupportedModel: it puts something else there.
    """
    bare = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    for begins in (False, True):
        for ends in (False, True):
            first = [special["bos"]] if begins and "bos" in special else []
            last = [special["eos"]] if ends else []
            if whole == [*first, *bare, *last]:
                return begins, ends
    raise _other_kind("it puts tokens around a text that are neither its first nor its last one")


def _tokens(
    vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], size: int
) -> tuple[list[str], list[gguf.TokenType]]:
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for text, number in vocab.items():
        tokens[number], kinds[number] = text, gguf.TokenType.NORMAL
    for one in added:
        kind = gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
        tokens[one["id"]], kinds[one["id"]] = one["content"], kind
    return tokens, kinds
