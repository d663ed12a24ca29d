"""Exact match: whether greedy decoding still writes the words and the results of sums that the text has.

An item is a word of at least four letters behind a space, or the number behind an equals sign that itself follows a
number (``2*15 =30``: school arithmetic, wherever the text has some). Greedy decoding writes it exactly where, given all
of the text before it, the most likely token is the text's own at each of its places, and the one after them does not
go on with it. As long as every token is the text's, the next place of the text is the one that decoding would be at,
so this is what generation from that prompt would write, at the price of one pass over the text for all items.

Two models write *the same* where both write the item exactly, or both leave the text at the same token for the same
other one. Where they go from there one pass does not tell.

Peak memory: one string and two numbers a token of a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from conmoe_edge.compress.stats.match_counts import RESULTS, WORDS
from conmoe_edge.compress.stream.calibration_text import TokenSet

_UNKNOWN = "\ufffd"
_PATTERNS = {
    # No letter, digit or half of a character may follow.
    WORDS: re.compile(rf"(?<= )[^\W\d_]{{4,}}(?![\w{_UNKNOWN}])"),
    RESULTS: re.compile(rf"(?<=[\d)%])\s*=\s*\$?(\d+(?:[.,]\d+)*)(?![\w{_UNKNOWN}])"),
}


@dataclass(frozen=True, slots=True)
class _Item:
    kind: str
    start: int
    stop: int


Left = tuple[int, int]
"""A place of the sequence, and the token that a model puts there instead."""


class MatchPlaces:
    """Where the items of a token set are, and which of them a model writes."""

    def __init__(self, tokens: TokenSet, tokenizer: Any) -> None:
        self._ids = tokens.ids
        self._pieces = _Pieces(tokenizer)
        self._items = [
            self._find(row[: int(mask.sum())].tolist())
            for row, mask in zip(tokens.ids, tokens.mask, strict=True)
        ]

    def _find(self, ids: list[int]) -> list[_Item]:
        pieces = [_UNKNOWN, *(self._pieces.of(a, b) for a, b in pairwise(ids))]
        places = {0: 0}
        at = 0
        for number, piece in enumerate(pieces, start=1):
            at += len(piece)
            places[at] = number
        text = "".join(pieces)
        found = []
        for kind, pattern in _PATTERNS.items():
            for match in pattern.finditer(text):
                begin, end = match.span(match.lastindex or 0)
                start, stop = places.get(begin), places.get(end)
                if start is None and text[begin - 1] == " ":  # it is in the same token
                    start = places.get(begin - 1)
                if start is not None and stop is not None and 0 < start < stop:
                    found.append(_Item(kind, start, stop))
        return found

    def written(self, row: int, chosen: Sequence[int]) -> list[tuple[str, Left | None]]:
        """For every item of a sequence its kind and where a model leaves the text; ``None`` where it never does.

        ``chosen`` [T]: the most likely token after each one of the sequence.
        """
        ids = self._ids[row].tolist()
        result: list[tuple[str, Left | None]] = []
        for item in self._items[row]:
            left = None
            for place in range(item.start, item.stop):
                if chosen[place - 1] != ids[place]:
                    left = place, chosen[place - 1]
                    break
            else:
                after = chosen[item.stop - 1]
                if self._pieces.of(ids[item.stop - 1], after)[:1].isalnum():
                    left = item.stop, after
            result.append((item.kind, left))
        return result


class _Pieces:
    """What a token adds to the text behind another one; a half of a character, or what cannot be told, is unknown."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=1 << 16)(self._of)
        self._alone = lru_cache(maxsize=1 << 16)(self._decode)

    def _decode(self, *ids: int) -> str:
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _of(self, before: int, token: int) -> str:
        if token == self._tokenizer.unk_token_id:
            return _UNKNOWN
        # Behind another token: some vocabularies drop the space in front of the first one.
        alone, both = self._alone(before), self._decode(before, token)
        return both[len(alone) :] if both.startswith(alone) else _UNKNOWN
