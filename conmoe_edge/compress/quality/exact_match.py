"""Adds up exact matches (``stream/match_places.py``) of one model, or of two beside each other."""

from __future__ import annotations

from torch import Tensor

from conmoe_edge.compress.stats.match_counts import ExactMatch
from conmoe_edge.compress.stream.match_places import MatchPlaces


class MatchTracker:
    """Adds up one model's exact matches, or those of two, sequence by sequence."""

    def __init__(self, places: MatchPlaces) -> None:
        self._places = places
        self._sums: dict[str, list[int]] = {}

    def add(self, row: int, logits: Tensor, reference: Tensor | None = None) -> None:
        """The logits [T, V] of a sequence, and those of the reference."""
        ours = self._places.written(row, logits.argmax(-1).tolist())
        theirs = ours
        if reference is not None:
            theirs = self._places.written(row, reference.argmax(-1).tolist())
        for (kind, one), (_, other) in zip(ours, theirs, strict=True):
            sums = self._sums.setdefault(kind, [0] * 5)
            pair = (one is None, other is None)
            for place, counts in enumerate((True, pair[0], pair[1], all(pair), one == other)):
                sums[place] += counts

    def result(self, *, alone: bool = False) -> dict[str, ExactMatch]:
        """Kind -> counts, of the kinds that the text has."""
        return {
            kind: ExactMatch(*(sums[:2] if alone else sums))
            for kind, sums in sorted(self._sums.items(), reverse=True)
        }
