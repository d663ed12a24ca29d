"""The part of an answer in which a model reasons, by its tokens: where it is, how long it is, and its end where it
becomes too long.

Only models whose marks are single tokens (``<think>``, ``</think>``) are known here; what is text and what is
reasoning in the text of other models says ``answer_parts.py``. Numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """How one answer reasons.

    Attributes:
        begin, end: the tokens that begin and end it; ``begin`` may be ``None``.
        started: whether the prompt has begun it.
        budget: most tokens of it; ``None`` for as many as it takes.
    """

    begin: int | None
    end: int
    started: bool = False
    budget: int | None = None


class Thinking:
    """Follows the tokens of one answer."""

    def __init__(self, marks: ThinkingMarks) -> None:
        self._marks = marks
        self.is_open = marks.started
        self.made = 0
        self._began = False

    @property
    def may_begin(self) -> int | None:
        """The token that would begin it here: the first of an answer alone; ``None`` where none would."""
        return None if self._began or self.is_open else self._marks.begin

    def forced(self) -> int | None:
        """The token that has to come next: the end, once the budget is used up; ``None`` where any may."""
        budget = self._marks.budget
        if self.is_open and budget is not None and self.made >= budget:
            return self._marks.end
        return None

    def took(self, token: int) -> None:
        """The answer goes on with ``token``."""
        if self.is_open:
            self.is_open = token != self._marks.end
            self.made += self.is_open
        else:
            self.is_open = token == self.may_begin
        self._began = True
