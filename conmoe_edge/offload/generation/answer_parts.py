"""The text of an answer in its parts, while it comes: what is said, what is reasoned, and which tools are called.

Models write all three into one text, with marks around the second and the third. A ``PartReader`` takes the text by
pieces and gives the parts as soon as they are certain: what could still become a mark is held back, and a call comes
when it is whole. What looks like a call and is none that can be read stays text. Strings only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Said:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the reasoning before it."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call of a tool; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str


Part = Said | Thought | Called


class PartReader(Protocol):
    """Text in, parts out."""

    def add(self, text: str) -> list[Part]:
        """The parts that became certain."""
        ...

    def finish(self) -> list[Part]:
        """What was held back: the answer is over."""
        ...


class PlainReader:
    """Everything is said."""

    def add(self, text: str) -> list[Part]:
        """As of ``PartReader``."""
        return [Said(text)] if text else []

    def finish(self) -> list[Part]:
        """As of ``PartReader``."""
        return []


@dataclass(frozen=True, slots=True)
class CallMarks:
    """Where calls stand in a text.

    Attributes:
        begin: what they begin with.
        end: what ends them; ``""`` for the end of the answer.
        read: the calls in the text between both; raises ``ValueError`` where that is none.
    """

    begin: str
    end: str
    read: Callable[[str], Sequence[Called]]


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """Where reasoning stands: at the beginning of an answer, or from its beginning to ``end`` where the prompt has
    ``started`` it."""

    begin: str
    end: str
    started: bool = False


class MarkedReader:
    """Parts by marks."""

    def __init__(
        self, reasoning: ReasoningMarks | None = None, calls: CallMarks | None = None
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._text = ""
        self._inside = "thought" if reasoning is not None and reasoning.started else "said"
        self._blanks = ""  # held back: they are no part of an answer before a call, nor of reasoning at its end
        self._spoke = False
        self._trims = self._inside == "thought"

    def add(self, text: str) -> list[Part]:
        """As of ``PartReader``."""
        self._text += text
        return joined(self._read(over=False))

    def finish(self) -> list[Part]:
        """As of ``PartReader``."""
        parts = self._read(over=True)
        if self._inside == "said":
            parts.append(Said(self._blanks))
            self._blanks = ""
        return joined(parts)

    def _read(self, *, over: bool) -> list[Part]:
        parts: list[Part] = []
        while True:
            marks = self._marks()
            at, mark = earliest(self._text, marks)
            if self._inside == "called":
                if mark:
                    body, self._text = self._text[:at], self._text[at + len(mark) :]
                    parts += self._call(body, mark)
                elif over:
                    body, self._text = self._text, ""
                    parts += self._call(body, "")
                    return parts
                else:
                    return parts
                continue
            if not mark:
                keep = 0 if over else unsure(self._text, marks)
                sure, self._text = (
                    self._text[: len(self._text) - keep],
                    self._text[len(self._text) - keep :],
                )
                parts += self._given(sure)
                return parts
            before, self._text = self._text[:at], self._text[at:]
            parts += self._given(before)
            if mark in self._marks():  # reasoning does not begin behind text
                self._text = self._text[len(mark) :]
                self._turn(mark)

    def _marks(self) -> list[str]:
        """The marks that mean something here."""
        if self._inside == "called":
            assert self._calls is not None
            return [self._calls.end] if self._calls.end else []
        if self._inside == "thought":
            assert self._reasoning is not None
            return [self._reasoning.end]
        found = [self._calls.begin] if self._calls is not None else []
        if self._reasoning is not None and not self._spoke:
            found.append(self._reasoning.begin)
        return found

    def _turn(self, mark: str) -> None:
        """What a mark outside of calls leads to. Blanks in front of it are nobody's."""
        self._blanks = ""
        if self._inside == "thought":
            self._inside, self._trims = "said", True
        elif self._calls is not None and mark == self._calls.begin:
            self._inside = "called"
        else:
            self._inside, self._trims = "thought", True

    def _given(self, text: str) -> list[Part]:
        """Text of what is said or reasoned; the blanks at its end are held back, those at its beginning left out."""
        if self._trims:
            text = text.lstrip()
            if not text:
                return []
            self._trims = False
        text = self._blanks + text
        bare = text.rstrip()
        self._blanks = text[len(bare) :]
        if not bare:
            return []
        if self._inside == "thought":
            return [Thought(bare)]
        self._spoke = True
        return [Said(bare)]

    def _call(self, body: str, end: str) -> list[Part]:
        assert self._calls is not None, "there is a mark"
        self._inside, self._spoke = "said", True
        try:
            calls = list(self._calls.read(body))
        except ValueError:
            calls = []
        if not calls:
            return [Said(self._calls.begin + body + end)]
        self._trims = True
        return [*calls]


def earliest(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """Where the first of the marks stands, and which one it is; ``""`` where there is none."""
    found = [(text.find(mark), mark) for mark in marks if mark in text]
    return min(found, default=(-1, ""))


def unsure(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that a mark begins with."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0


def joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of one kind are one; nothing is left out but empty ones."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Called):
            found.append(part)
        elif not part.text:
            continue
        elif isinstance(part, Said) and isinstance(last, Said):
            found[-1] = Said(last.text + part.text)
        elif isinstance(part, Thought) and isinstance(last, Thought):
            found[-1] = Thought(last.text + part.text)
        else:
            found.append(part)
    return found
