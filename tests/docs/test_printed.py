"""The comparison of a document with an output notices what is missing, and not other figures."""

from __future__ import annotations

import pytest
from docs.printed import check_printed

OUTPUT = "Head\n  all     8,176  3.556   ×1.001\n  layer 1\n   0  ░●▒●\nEnd 1.2 MiB\n"


def test_figures_and_blanks_may_differ() -> None:
    check_printed("all  7,000 3.1 ×9.9\n 12 █●\nEnd 9 MiB", OUTPUT)


@pytest.mark.parametrize("block", ["Tail", "End 1.2 KiB", "End 1.2 MiB\nHead", "all 1 2"])
def test_words_units_and_order_may_not(block: str) -> None:
    with pytest.raises(AssertionError, match="no longer printed"):
        check_printed(block, OUTPUT)
