"""Counts of exact matches (``stream/match_places.py``), how sure they are, and how a receipt keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

WORDS, RESULTS = "words", "results"


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """Counts of one kind of items.

    Attributes:
        items: how many the text has.
        right: those that the model writes exactly.
        reference_right, both_right: those of the reference, and of both; ``None`` without a reference.
        same: those where both write the same.
    """

    items: int
    right: int
    reference_right: int | None = None
    both_right: int | None = None
    same: int | None = None

    @property
    def difference(self) -> tuple[float, float] | None:
        """Share of the model less that of the reference, and the half-width of its 95 % interval.

        The interval is Wald's for matched pairs with 1/2 added to each of the four counts (Agresti and Min 2005,
        Statistics in Medicine 24), which is honest for few items as well.
        """
        if self.reference_right is None or self.both_right is None or not self.items:
            return None
        gained, lost = self.right - self.both_right, self.reference_right - self.both_right
        apart = gained + lost + 1.0
        count = self.items + 2.0
        variance = (apart - (gained - lost) ** 2 / count) / count**2
        return (gained - lost) / self.items, 1.96 * max(0.0, variance) ** 0.5


def matches_in(receipt: Mapping[str, Any]) -> dict[str, ExactMatch]:
    """What a receipt says under ``exact_match``; what is no count of this kind is left out, since it is a file's."""
    found = {}
    stored = receipt.get("exact_match")
    names = [field.name for field in fields(ExactMatch)]
    for kind in (WORDS, RESULTS):
        row = stored.get(kind) if isinstance(stored, Mapping) else None
        counts: list[Any] = [row.get(name) for name in names] if isinstance(row, Mapping) else []
        if all(type(count) is int and count >= 0 for count in counts) and any(counts[:1]):
            found[kind] = ExactMatch(*counts)
    return found
