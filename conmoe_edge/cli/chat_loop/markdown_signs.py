"""Whether a text is written in Markdown, and not just prose that would be filled anew."""

from __future__ import annotations

import re

_SIGNS = re.compile(
    r"^\s{0,3}(?:```|~~~|\#{1,6}\s\S|[-*+]\s+\S|\d{1,3}[.)]\s+\S|\|.*\|\s*$)|\*\*\S.*?\S\*\*|`[^`\n]+`",
    re.MULTILINE,
)


def is_markdown(text: str) -> bool:
    """Whether there is a code block, a heading, a list, a table, bold text or code between words."""
    return _SIGNS.search(text) is not None
