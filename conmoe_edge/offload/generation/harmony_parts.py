"""Answers in harmony, the form of gpt-oss: messages that each name a channel, and tools by their recipient.

``<|channel|>analysis<|message|>...<|end|>`` is reasoning, ``<|channel|>final<|message|>...`` the answer, and
``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>`` a call; the channel ``commentary``
without a recipient is said to the user. The form is OpenAI's ("OpenAI harmony response format"). Strings only; the
marks have to be in the text.
"""

from __future__ import annotations

import re

from conmoe_edge.offload.generation.answer_parts import (
    Called,
    Part,
    Said,
    Thought,
    earliest,
    joined,
    unsure,
)
from conmoe_edge.offload.generation.tool_forms import json_value

MESSAGE = "<|message|>"
CHANNEL = "<|channel|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_RECIPIENT = re.compile(r"to=functions\.([A-Za-z0-9_.:/-]+)")


class HarmonyReader:
    """As of ``PartReader``. Text outside of messages, where a model forgets the marks, is said."""

    def __init__(self) -> None:
        self._text = ""
        self._head: str | None = ""  # of the message that begins; None inside one
        self._channel = ""
        self._tool: str | None = None
        self._arguments = ""

    def add(self, text: str) -> list[Part]:
        """As of ``PartReader``."""
        self._text += text
        return joined(self._read(over=False))

    def finish(self) -> list[Part]:
        """As of ``PartReader``."""
        parts = self._read(over=True)
        if self._head is None:
            parts += self._ended("")
        return joined(parts)

    def _read(self, *, over: bool) -> list[Part]:
        parts: list[Part] = []
        while self._text:
            if self._head is not None:
                before, mark, after = self._text.partition(MESSAGE)
                if not mark:
                    if self._is_head(self._text) and not over:
                        return parts
                    lost, self._text = self._text, ""  # no head of a message after all
                    if not over or not self._is_head(lost):
                        parts.append(Said(lost))
                        self._head, self._channel, self._tool = None, "final", None
                    return parts
                self._begin(before)
                self._text = after
            at, end = earliest(self._text, _ENDS)
            if not end:
                keep = 0 if over else unsure(self._text, _ENDS)
                cut = len(self._text) - keep
                parts += self._inside(self._text[:cut])
                self._text = self._text[cut:]
                return parts
            parts += self._inside(self._text[:at])
            parts += self._ended(end)
            self._text = self._text[at + len(end) :]
        return parts

    @staticmethod
    def _is_head(text: str) -> bool:
        """Whether a message may begin so: with a mark, or a part of one, or the role behind ``<|start|>``."""
        bare = text.lstrip()
        marks = ("<|start|>", CHANNEL, "assistant", " to=")
        return not bare or any(bare.startswith(one) or one.startswith(bare) for one in marks)

    def _begin(self, head: str) -> None:
        channel = head.rpartition(CHANNEL)[2].split()
        recipient = _RECIPIENT.search(head)
        self._channel = channel[0].partition("<|")[0] if channel else "final"
        self._tool = None if recipient is None else recipient[1]
        self._head, self._arguments = None, ""

    def _inside(self, text: str) -> list[Part]:
        if self._tool is not None:
            self._arguments += text
            return []
        return [Thought(text) if self._channel == "analysis" else Said(text)]

    def _ended(self, end: str) -> list[Part]:
        tool, self._tool, self._head = self._tool, None, ""
        if tool is None:
            return []
        try:
            given = json_value(self._arguments or "{}")
        except ValueError:
            given = None
        if not isinstance(given, dict):
            return [Said(self._arguments)]
        return [Called(tool, self._arguments or "{}")]
