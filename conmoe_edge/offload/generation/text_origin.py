"""Which characters of a rendered prompt come from the messages, and which from the chat template.

The conversation is rendered a second time with every character of the messages replaced by a stand-in, a private-use
character that occurs nowhere else. Where the second text is the first one with stand-ins in it, the stand-ins are the
characters of the messages. Blanks stay, because templates trim them; so do the words that a template looks for in a
message (``/no_think``), unless they could be a part of a control token. In the model's own answers, ``</think>`` and
the like, which are no special tokens, stay too where a template looks for them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from conmoe_edge.offload.generation.control_tokens import ControlTokens, may_be_part

_OWN = "assistant"
_PRIVATE = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))


class StandIns:
    """The stand-ins of one conversation."""

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        template: str,
        looked_for: Iterable[str],
        control: ControlTokens,
    ) -> None:
        """``looked_for``: constants of the template, as ``TemplateRenderer.looked_for`` has them."""
        strings = list(_strings(messages))
        characters = set().union(*strings)
        free = _free(characters | set(template))
        self._to = {ord(c): next(free) for c in sorted(characters) if not c.isspace()}
        self._back = {stand_in: original for original, stand_in in self._to.items()}
        self._all = frozenset(map(chr, self._back))
        there = [one for one in looked_for if any(one in text for text in strings)]
        safe = [one for one in there if not any(may_be_part(one, t) for t in control.texts)]
        own = [
            one
            for one in there
            if any(token in one for token in control.written)
            and not any(may_be_part(one, token) for token in control.special)
        ]
        self._kept = _any_of(safe)
        self._kept_of_own = _any_of([*safe, *own])
        self.messages = [self._message(message) for message in messages]

    def restored(self, text: str) -> str:
        """The characters that stand-ins stand for, in their places."""
        return text.translate(self._back)

    def any_in(self, text: str) -> bool:
        """Whether a stand-in is there."""
        return not self._all.isdisjoint(text)

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        kept = self._kept_of_own if message.get("role") == _OWN else self._kept
        return {
            key: value if key == "role" else self._value(value, kept)
            for key, value in message.items()
        }

    def _value(self, value: Any, kept: re.Pattern[str] | None) -> Any:
        if isinstance(value, str):
            parts = [value] if kept is None else kept.split(value)
            return "".join(
                part if index % 2 else part.translate(self._to) for index, part in enumerate(parts)
            )
        if isinstance(value, Mapping):
            return {key: self._value(one, kept) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._value(one, kept) for one in value]
        return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from _strings(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _strings(one)


def _free(taken: set[str]) -> Iterator[int]:
    """Private-use code points that are not taken; more than a text has different characters."""
    points = itertools.chain.from_iterable(range(first, last + 1) for first, last in _PRIVATE)
    return (point for point in points if chr(point) not in taken)


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if texts else None
