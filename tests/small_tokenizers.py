"""Small tokenizers of every kind, trained on the spot, with the control tokens of ``chat_templates``."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.chat_templates import NOT_SPECIAL, SPECIAL

TEXT = [
    "The river runs to the sea, and the sea is wide. <b>bold</b> user assistant system tool end start think",
    "Names: Ana, Bo, Cy; 1 2 3 4 5 (six) [seven] {eight} | nine / ten \\ eleven _ twelve - x = y + z ? ! im sep",
    "\n\n  Blank lines\n\tand tabs \u00e9\u00fc\u00df \u4e2d\u6587 \u0440\u0443\u0441 <|> </ <| |> [/ ] INST gMASK sop",
]
KINDS = ("byte-bpe", "bytes-behind", "unigram", "wordpiece", "words")


@functools.cache
def make(kind: str, *, begins: bool = True) -> Any:
    """A tokenizer of a kind; ``begins``: it puts ``<s>`` before a text, as most do.

    ``byte-bpe`` is that of most models; ``bytes-behind`` is BPE with ``▁`` for blanks and bytes behind, as Mixtral's.
    """
    tokenizer, trainer = _KINDS[kind]()
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = []  # the trainer calls the tokens that it is given special
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in NOT_SPECIAL])
    if begins:
        first = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", first)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _byte_bpe() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False
    )


def _bytes_behind() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, show_progress=False)
    return tokenizer, trainer


def _unigram() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


def _wordpiece() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["<unk>"], show_progress=False
    )


def _words() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)


_KINDS = {
    "byte-bpe": _byte_bpe,
    "bytes-behind": _bytes_behind,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "words": _words,
}
