"""Which answers are Markdown."""

from __future__ import annotations

import pytest

from conmoe_edge.cli.chat_loop.markdown_signs import is_markdown


@pytest.mark.parametrize(
    "text",
    [
        "# A title",
        "a\n```py\nx\n```",
        "- one\n- two",
        "1. one",
        "a **bold** word",
        "`code`",
        "|a|b|\n|-|-|",
    ],
)
def test_it_is(text: str) -> None:
    assert is_markdown(text)


@pytest.mark.parametrize(
    "text", ["Plain prose.\nTwo lines.", "2 * 3 ** 4", "#hash", "a | b", "-5 degrees", ""]
)
def test_it_is_not(text: str) -> None:
    assert not is_markdown(text)
