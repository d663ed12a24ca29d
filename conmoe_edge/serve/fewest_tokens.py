"""How few tokens a text can come to, known without tokenising it.

Where every byte of a text ends up in some token, a token of L bytes covers L of them. With m(b) the length of the
longest token in which byte b occurs, the bytes of one token have m(b) >= L each, so that the sum of 1 / m(b) over them
is 1 at the most, and over the whole text

    tokens >= sum over the bytes of 1 / m(byte).

That every byte ends up in a token is read off ``tokenizer.json``: a BPE model that has a token for every byte, whose
pieces are split and never dropped, with a normaliser that leaves bytes as they are or composes characters (NFC). Any
other tokenizer gets no bound at all (``weights`` is ``None``): its texts are tokenised and counted.

Source of the formats: the ``tokenizers`` library (normalizers, pre_tokenizers, models.BPE). Memory: the vocabulary
once, while it is looked at.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np

_KEEPING = frozenset({"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"})
_SHRINKS = 3
"""NFC leaves a third of the bytes at the least: Hangul letters, nine bytes, become a syllable of three."""
_UNKNOWN = 4
"""Of bytes in characters that may be newer than Python's tables, so much less is counted."""
_BLANK = "\u2581"
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class FewestTokens:
    """The bound of one tokenizer.

    Attributes:
        weights: fp64 [256], 1 / m(b); 0 for bytes that may end up in no token. ``None`` where nothing is known.
        composes: whether the normaliser is NFC.
        blanks: whether a blank and the character that stands for it in the vocabulary are the same to it.
    """

    weights: np.ndarray | None
    composes: bool = False
    blanks: bool = False

    @property
    def longest(self) -> int | None:
        """Most bytes of a text to one of its tokens; ``None`` where there is no bound."""
        if self.weights is None or not self.weights.all():
            return None
        return round(1 / float(self.weights.min())) * (_SHRINKS if self.composes else 1)

    def of(self, text: str) -> int:
        """At least so many tokens has ``text``; 0 where nothing is known."""
        if self.weights is None:
            return 0
        weights = self.weights
        if self.blanks:
            text = text.replace(_BLANK, " ")
        if self.composes and not text.isascii():
            text = unicodedata.normalize("NFC", text)
            weights = weights.copy()
            weights[0x80:] /= _UNKNOWN
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(text), _PIECE):  # so that no second copy of a long text is made
            piece = text[start : start + _PIECE].encode("utf-8", "surrogatepass")
            counts += np.bincount(np.frombuffer(piece, dtype=np.uint8), minlength=256)
        # The sum is rounded; a millionth less is still a bound.
        return int(np.ceil(float(counts @ weights) * (1 - 1e-6)))


UNKNOWN = FewestTokens(None)


def fewest_tokens(tokenizer: Any) -> FewestTokens:
    """The bound for ``tokenizer``, one of transformers'."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return UNKNOWN
    # Not of the tokenizer's own methods: they say what a vocabulary is, not what becomes of a text.
    described = json.loads(backend.to_str())
    normal = _normaliser(described.get("normalizer"))
    model = described["model"]
    split = _split(described.get("pre_tokenizer"))
    if normal is None or split is None or model.get("type") != "BPE" or not _plain(model):
        return UNKNOWN
    byte_level = "ByteLevel" in split
    alphabet = byte_alphabet() if byte_level else {}
    weights = np.zeros(256)
    longest = np.zeros(256, dtype=np.int64)
    single: set[int] = set()
    for word in model["vocab"]:
        token = _bytes_of(word, alphabet, byte_level)
        if token is None:
            return UNKNOWN
        if len(token) == 1:
            single.add(token[0])
        for byte in set(token):
            longest[byte] = max(longest[byte], len(token))
    fallback = byte_level or bool(model.get("byte_fallback"))
    if not fallback or len(single) < 256:
        return UNKNOWN
    blanks = False
    for added in described.get("added_tokens") or ():
        token = added["content"].encode()
        for byte in set(token):
            longest[byte] = max(longest[byte], len(token))
        blanks |= bool(added.get("lstrip") or added.get("rstrip"))  # it takes blanks with it
    weights = 1 / np.maximum(longest, 1)
    if blanks:
        weights[[*range(0x21), 0x7F, *range(0x80, 0x100)]] = 0
    return FewestTokens(weights, normal == "NFC", not byte_level)


def _plain(model: dict[str, Any]) -> bool:
    """Whether the model's tokens are pieces of the text as they stand."""
    return not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")


def _normaliser(value: Any) -> str | None:
    """What it does to bytes: ``""`` nothing that loses any, ``NFC``; ``None`` for anything else."""
    if value is None:
        return ""
    kind = value.get("type")
    if kind == "NFC":
        return "NFC"
    if kind == "Prepend":
        return ""
    if kind == "Replace":
        same = value.get("pattern") == {"String": " "} and value.get("content") == _BLANK
        return "" if same else None
    if kind == "Sequence":
        parts = [_normaliser(one) for one in value.get("normalizers", ())]
        if None in parts:
            return None
        return "NFC" if "NFC" in parts else ""
    return None


def _split(value: Any) -> set[str] | None:
    """The kinds of pre-tokenizer, where none of them drops anything; ``None`` else."""
    if value is None:
        return set()
    kind = value.get("type")
    if kind == "Sequence":
        parts = [_split(one) for one in value.get("pretokenizers", ())]
        if any(part is None for part in parts):
            return None
        return set().union(*(part for part in parts if part is not None))
    keeps = kind in ("ByteLevel", "Digits", "Metaspace")
    if kind in ("Split", "Punctuation"):
        keeps = value.get("behavior") in _KEEPING
    return {str(kind)} if keeps else None


def _bytes_of(word: str, alphabet: dict[str, int], byte_level: bool) -> bytes | None:
    """The bytes of a text that the token ``word`` stands for."""
    if byte_level:
        if all(character in alphabet for character in word):
            return bytes(alphabet[character] for character in word)
        return word.encode("utf-8", "surrogatepass")  # one that was added: it stands for itself
    if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        try:
            return bytes([int(word[3:5], 16)])
        except ValueError:
            pass
    # A blank may stand for itself, or for the character that was put in its place.
    return word.replace(_BLANK, " ").encode("utf-8", "surrogatepass")


def byte_alphabet() -> dict[str, int]:
    """The character by which byte-level vocabularies write each byte, as GPT-2's encoder has it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**alphabet, **{chr(256 + n): byte for n, byte in enumerate(hidden)}}
