"""Exact matches in words, one or two lines for each kind of items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conmoe_edge.compress.stats.match_counts import ExactMatch

_NAMES = {"words": "words", "results": "results of sums"}


def match_lines(matches: Mapping[str, ExactMatch], other: str = "reference") -> Iterator[str]:
    """``other`` is what the model is compared with. Differences are in points of percent, with a 95 % interval."""
    for kind, one in matches.items():
        line = f"{one.items:,} {_NAMES.get(kind, kind)}: {100 * one.right / one.items:.1f} % written exactly"
        if one.difference is not None and one.reference_right is not None and one.same is not None:
            by, width = one.difference
            line += f" ({other} {100 * one.reference_right / one.items:.1f} %, {100 * by:+.1f} ± {100 * width:.1f})"
            yield line
            line = f"  {100 * one.same / one.items:.1f} % the same as by the {other}"
        yield line
