"""The tokenizer that a GGUF file describes, written as the files of a tokenizer of the ``tokenizers`` library.

GGUF keeps the tokens, the merges and the *name* of the way in which text is split before; the expression behind that
name is in llama.cpp's source. A byte-level vocabulary is built for the names whose expression is known here; with
another one the text would be cut differently without any error, so it is refused. SentencePiece vocabularies are built
as the converted tokenizers of the Llama 2 kind are.

Peak memory: the vocabulary several times, some hundred MB for the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from conmoe_edge.errors import CheckpointError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_TOKENS, _TYPES, _MERGES = (
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
)
_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_ENDS = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_END}"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_END}"
)

SPLITS: dict[str, str | None] = {
    "gpt-2": None,  # the expression of the byte-level step itself
    "olmo": None,
    "qwen2": _QWEN,
    "llama-bpe": _LLAMA3,
    "gpt-4o": _GPT4O,
}
"""llama.cpp's name of a split -> its expression, as the tokenizers of these models have it."""
_COMPOSED = frozenset({"olmo", "qwen2"})
"""Those whose own tokenizers compose characters first (NFC)."""


def refusal_of(metadata: Mapping[str, Any]) -> str:
    """Why no tokenizer can be made from the metadata, as half a sentence; empty where one can."""
    kind, split = metadata.get(_MODEL), metadata.get(_PRE, "default")
    tokens = metadata.get(_TOKENS)
    if not isinstance(tokens, list) or not tokens:
        return "the file has no vocabulary"
    if kind == "gpt2" and split not in SPLITS:
        return f"its way to split text ({str(split)[:40]}) is not known here"
    if kind == "gpt2" and not isinstance(metadata.get(_MERGES), list):
        return "it has no merges"
    if kind not in ("gpt2", "llama"):
        return f"its vocabulary is of a kind that is not read here ({str(kind)[:40]})"
    if kind == "llama" and not _is_numbers(metadata.get("tokenizer.ggml.scores"), len(tokens)):
        return "it has no scores"
    if len(set(tokens)) != len(tokens):
        return "its vocabulary has a token twice"
    return ""


def tokenizer_of(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer; ``refusal_of`` has said nothing.

    Raises:
        Exception: whatever the libraries say to a vocabulary that cannot be.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = _byte_level(metadata) if metadata[_MODEL] == "gpt2" else _pieces(metadata)
    tokens, types = metadata[_TOKENS], types_of(metadata)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    added = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in special])
    backend.add_tokens([AddedToken(one, normalized=False) for one in added])
    named = {name: _token(metadata, key) for name, key in _SPECIAL.items()}
    _frame(backend, metadata, named)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token is not None},
    )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def types_of(metadata: Mapping[str, Any]) -> list[int]:
    """The type of each token; all are plain where the file does not say it.

    Raises:
        CheckpointError: it says it of another number of tokens.
    """
    tokens, types = metadata[_TOKENS], metadata.get(_TYPES)
    if types is None:
        return [NORMAL] * len(tokens)
    if not _is_numbers(types, len(tokens)):
        raise CheckpointError(
            f"The file has {len(tokens)} tokens, and types of another number of them.",
            "",
            "Download the file again.",
        )
    return types.tolist()


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer, the end of a text first."""
    if not isinstance(metadata.get(_TOKENS), list):
        return []
    count = len(metadata[_TOKENS])
    found: list[int] = []
    for key in _ENDS:
        number = metadata.get(key)
        if type(number) is int and 0 <= number < count and number not in found:
            found.append(number)
    # llama.cpp finds the end of a turn by its text, where the file does not name it.
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and "<|return|>" not in template:
        for text in _TURN_ENDS:
            if text in template and text in metadata[_TOKENS]:
                number = metadata[_TOKENS].index(text)
                if types_of(metadata)[number] == CONTROL and number not in found:
                    found.append(number)
    return found


def differs_from(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> bool:
    """Whether a tokenizer with this ``vocabulary`` (token -> number) is another one than the file's."""
    tokens = metadata.get(_TOKENS)
    if not isinstance(tokens, list) or not vocabulary:
        return True
    known = {number: token for token, number in vocabulary.items()}
    if max(known) >= len(tokens):
        return True
    types = types_of(metadata)
    # Added tokens may be written in a normalised way.
    plain = [number for number, kind in enumerate(types) if kind == NORMAL]
    return not plain or any(known.get(number) != tokens[number] for number in plain)


def _is_numbers(value: Any, count: int) -> bool:
    return isinstance(value, np.ndarray) and len(value) == count


def _token(metadata: Mapping[str, Any], key: str) -> str | None:
    number, tokens = metadata.get(key), metadata[_TOKENS]
    return tokens[number] if type(number) is int and 0 <= number < len(tokens) else None


def _byte_level(metadata: Mapping[str, Any]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens, types, split = metadata[_TOKENS], types_of(metadata), metadata[_PRE]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata[_MERGES]]
    vocabulary = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED
    }
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe")
    )
    if split in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    expression = SPLITS[split]
    if expression is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(expression), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces(metadata: Mapping[str, Any]) -> Any:
    """SentencePiece with scores, as BPE: a pair is joined the earlier, the higher the score of what it makes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = metadata[_TOKENS], metadata["tokenizer.ggml.scores"].tolist()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [
        (-scores[number], number, cut)
        for token, number in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges = [(tokens[number][:cut], tokens[number][cut:]) for _, number, cut in sorted(pairs)]
    unknown = _token(metadata, _SPECIAL["unk_token"])
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    blank = normalizers.Replace(" ", "▁")
    leading = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), blank] if leading else [blank]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if leading else steps)
    return tokenizer


def _frame(backend: Any, metadata: Mapping[str, Any], named: Mapping[str, str | None]) -> None:
    """The tokens before and behind a text, where the file asks for them."""
    from tokenizers import processors

    usual = metadata[_MODEL] == "llama" or metadata.get(_PRE) == "llama-bpe"
    first = metadata.get("tokenizer.ggml.add_bos_token", usual) and named["bos_token"]
    last = metadata.get("tokenizer.ggml.add_eos_token", False) and named["eos_token"]
    if not first and not last:
        if metadata[_MODEL] == "gpt2":
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    frame = [f"{first}:0"] * bool(first) + ["$A:0"] + [f"{last}:0"] * bool(last)
    numbers = [(one, backend.token_to_id(one)) for one in (first, last) if one]
    pair = [piece.replace(":0", ":1") for piece in frame]
    backend.post_processor = processors.TemplateProcessing(
        single=frame,
        pair=[*frame, *[piece.replace("$A", "$B") for piece in pair]],
        special_tokens=numbers,
    )
