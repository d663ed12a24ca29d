"""Tokens to text while they come: whole characters as soon as they are certain.

A character may take several tokens (bytes of one code point), and how a token reads may depend on
the one before it (a leading blank, say). So a small window of tokens is decoded twice, with and
without the new ones, and the difference is given out unless it ends in an unfinished character.
"""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\ufffd"


class TextStream:
    """Feed tokens, get text; the pieces and ``finish`` together are the text that decoding all
    tokens at once gives.
    """

    def __init__(self, tokenizer: Any, shown: frozenset[int] = frozenset()) -> None:
        """``shown``: special tokens that are text here, where the others are none."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items() if shown else ()
        special = {number for number, token in added if token.special}
        self._left_out = special - shown
        self._skips = not shown
        self._tokens: list[int] = []
        self._start = 0  # first token of the window
        self._given = 0  # tokens before this one have been given out

    def add(self, token: int) -> str:
        """The text that became certain with ``token``; often a word, sometimes nothing."""
        if token in self._left_out:
            return ""
        self._tokens.append(token)
        before = self._decode(self._start, self._given)
        now = self._decode(self._start, len(self._tokens))
        if len(now) <= len(before) or now.endswith(_UNFINISHED):
            return ""
        self._start, self._given = self._given, len(self._tokens)
        return now[len(before) :]

    def finish(self) -> str:
        """What was held back: at the end even an unfinished character is text."""
        before = self._decode(self._start, self._given)
        now = self._decode(self._start, len(self._tokens))
        self._start = self._given = len(self._tokens)
        return now[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(
            self._tokens[start:stop],
            skip_special_tokens=self._skips,
            clean_up_tokenization_spaces=False,
        )
