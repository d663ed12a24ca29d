"""Which tokens of a tokenizer steer a model: what user text must never become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The tokens that steer.

    Attributes:
        special: texts of those that the tokenizer calls special.
        written: texts of other added tokens that the chat template names, such as ``</think>``. Blanks are text.
        spelling: id to text, of both.
        unknown: the id that stands for text the tokenizer does not know.
    """

    special: frozenset[str]
    written: frozenset[str]
    spelling: Mapping[int, str]
    unknown: int | None

    @classmethod
    def of(cls, tokenizer: Any, template: str) -> ControlTokens:
        """``template`` is the source of the chat template, or empty."""
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        special = {text for text, is_special in added.items() if is_special}
        special |= set(tokenizer.all_special_tokens)
        named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
        written = {text for text in added if text in named or text in template}
        both = {text for text in special | written if text and not text.isspace()}
        ordered = sorted(both)
        spelling = dict(zip(tokenizer.convert_tokens_to_ids(ordered), ordered, strict=True))
        return cls(
            frozenset(both & special), frozenset(both - special), spelling, tokenizer.unk_token_id
        )

    def steers(self, token: int, text: str) -> bool:
        """Whether ``token``, which came out of ``text``, is a control token. Two kinds are so only where they are spelt
        out: what stands for unknown text, and what stands for one character (``<0x0A>``, in tokenizers that call bytes
        special).
        """
        spelling = self.spelling.get(token)
        if spelling is None:
            return False
        plain = text.strip()
        return plain == spelling or (token != self.unknown and len(plain) > 1)

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
