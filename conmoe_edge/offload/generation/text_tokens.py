"""Text to tokens, where some of the text may become control tokens and the rest may not.

The text is encoded whole, by the tokenizer alone; that is the result unless a control token came out that has
characters of a user in it. There the text is cut, inside the token's spelling, and the pieces are encoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.control_tokens import ControlTokens

ALLOW = "--allow-special-tokens lets messages have them"
_LEADS = ("\n", "\ue000", "a")

IsUsers = Callable[[int, int], bool]
"""Whether a character of a user is among those from one position of the text to another."""


class _Control(NamedTuple):
    """A control token in an encoded text: its id, and where its characters begin and end."""

    token: int
    begin: int
    end: int


_Encoded = tuple[list[int], list[_Control]]


def encode_apart(tokenizer: Any, text: str, is_users: IsUsers, control: ControlTokens) -> list[int]:
    """The tokens of ``text``, without those that a tokenizer puts around it. No control token has a user's characters.

    Raises:
        UsageError: a single character of the user's is a control token.
    """
    done: list[tuple[int, list[int]]] = []
    pieces = [(0, len(text))]
    while pieces:
        cut: list[tuple[int, int]] = []
        encoded = _pieces(tokenizer, text, pieces, control)
        for (begin, end), (ids, found) in zip(pieces, encoded, strict=True):
            moved = (one._replace(begin=begin + one.begin, end=begin + one.end) for one in found)
            cuts = [_cut(text, one) for one in moved if is_users(one.begin, one.end)]
            if cuts:
                cut += zip([begin, *cuts], [*cuts, end], strict=True)
            else:
                done.append((begin, ids))
        pieces = cut
    return [token for _, ids in sorted(done) for token in ids]


def control_tokens_in(tokenizer: Any, text: str, control: ControlTokens) -> list[int]:
    """The control tokens that come out of a text, in order."""
    ((_, found),) = _encoded(tokenizer, [text], control)
    return [one.token for one in found]


def _cut(text: str, token: _Control) -> int:
    """A position inside the spelling of a token."""
    spelt = text[token.begin : token.end]
    begin = token.begin + len(spelt) - len(spelt.lstrip())
    end = token.begin + len(spelt.rstrip())
    if end - begin < 2:
        raise UsageError(
            f"{spelt.strip()!r} is a control token of this model, and cannot be written as text.",
            "",
            f"leave it out; {ALLOW}",
        )
    return (begin + end) // 2


def _pieces(
    tokenizer: Any, text: str, pieces: Sequence[tuple[int, int]], control: ControlTokens
) -> list[_Encoded]:
    """Pieces of a text as they are inside it: without the blank that some tokenizers put before a text."""
    texts = [text[begin:end] for begin, end in pieces]
    if len(pieces) == 1:
        return _encoded(tokenizer, texts, control)
    results: dict[int, _Encoded] = {}
    for lead in _LEADS:
        ((head, _),) = _encoded(tokenizer, [lead], control)
        left = [n for n, (begin, _) in enumerate(pieces) if begin and n not in results]
        tried = _encoded(tokenizer, [lead + texts[n] for n in left], control)
        for number, (ids, found) in zip(left, tried, strict=True):
            if ids[: len(head)] == head and all(one.begin >= len(lead) for one in found):
                moved = [_Control(t, a - len(lead), b - len(lead)) for t, a, b in found]
                results[number] = (ids[len(head) :], moved)
    left = [n for n in range(len(pieces)) if n not in results]
    plain = _encoded(tokenizer, [texts[n] for n in left], control)
    results.update(zip(left, plain, strict=True))
    return [results[number] for number in range(len(pieces))]


def _encoded(tokenizer: Any, texts: Sequence[str], control: ControlTokens) -> list[_Encoded]:
    """The tokens of each text, and the control tokens among them."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [_encoded_slowly(tokenizer, text, control) for text in texts]
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    results = []
    for text, ids, places in zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True):
        found = [
            _Control(token, begin, end)
            for token, (begin, end) in zip(ids, places, strict=True)
            if control.steers(token, text[begin:end])
        ]
        results.append((list(ids), found))
    return results


def _encoded_slowly(tokenizer: Any, text: str, control: ControlTokens) -> _Encoded:
    """For a tokenizer in Python: it does not say where tokens come from, but finds control tokens as they are spelt."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    spelt = sorted(control.texts, key=len, reverse=True)
    matches = re.finditer("|".join(map(re.escape, spelt)) or r"(?!)", text)
    token = tokenizer.convert_tokens_to_ids
    return list(ids), [_Control(token(m.group()), m.start(), m.end()) for m in matches]
