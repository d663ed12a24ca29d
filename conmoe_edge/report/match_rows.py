"""The receipt's exact matches as rows of a table, for the model card and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conmoe_edge.compress.stats.match_counts import RESULTS, WORDS, matches_in

MATCH_HEADERS = ("greedy decoding writes", "items", "original", "package", "difference", "the same")
MATCH_LEAD = (
    "Words of that text, and results of sums in it, that greedy decoding writes exactly when it is given the text "
    "before them. The difference is in points of percent, with its 95 % interval."
)
_NAMES = {WORDS: "words", RESULTS: "results of sums"}


def match_rows(receipt: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each kind of items; none where a receipt has no counts."""
    rows = []
    for kind, one in matches_in(receipt).items():
        if one.difference is None or one.reference_right is None or one.same is None:
            continue
        by, width = one.difference
        shares = [100 * count / one.items for count in (one.reference_right, one.right, one.same)]
        rows.append(
            (
                _NAMES[kind],
                f"{one.items:,}",
                f"{shares[0]:.1f} %",
                f"{shares[1]:.1f} %",
                f"{100 * by:+.1f} ± {100 * width:.1f}",
                f"{shares[2]:.1f} %",
            )
        )
    return rows
