"""Stop strings in text that comes by pieces. Strings only."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string, which itself is never given out.

    What could still become a stop string is held back until it is certain.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.met: str | None = None

    @property
    def hit(self) -> bool:
        """Whether a stop string came; ``met`` is it."""
        return self.met is not None

    def add(self, piece: str) -> str:
        """The text that is certain now. After a stop was met there is no more."""
        if self.hit:
            return ""
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            at, self.met = min(found)
            self._held = ""
            return text[:at]
        keep = self._unsure(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back: at the end it is text."""
        rest, self._held = self._held, ""
        return rest

    def _unsure(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
