"""Which tokens of a tokenizer steer a model: what user text must never become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The tokens that steer.

    Attributes:
        special: texts of those that the tokenizer calls special.
        written: texts of other added tokens that the chat template names, such as ``</think>``. Blanks are text.
        ids: of both.
        unknown: the id that stands for text the tokenizer does not know; it steers only where it is spelt out.
        unknown_text: how that is spelt.
    """

    special: frozenset[str]
    written: frozenset[str]
    ids: frozenset[int]
    unknown: int | None
    unknown_text: str

    @classmethod
    def of(cls, tokenizer: Any, template: str) -> ControlTokens:
        """``template`` is the source of the chat template, or empty."""
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        special = {text for text, is_special in added.items() if is_special}
        special |= set(tokenizer.all_special_tokens)
        named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
        written = {text for text in added if text in named or text in template}
        both = {text for text in special | written if text and not text.isspace()}
        ids = tokenizer.convert_tokens_to_ids(sorted(both))
        return cls(
            frozenset(both & special),
            frozenset(both - special),
            frozenset(ids),
            tokenizer.unk_token_id,
            tokenizer.unk_token or "",
        )

    @property
    def texts(self) -> frozenset[str]:
        """Of all."""
        return self.special | self.written


def may_be_part(text: str, token: str) -> bool:
    """Whether an occurrence of ``token`` could share characters with an occurrence of ``text``."""
    if text in token or token in text:
        return True
    lengths = range(1, min(len(text), len(token)))
    return any(token.startswith(text[-n:]) or token.endswith(text[:n]) for n in lengths)
