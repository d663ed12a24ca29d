"""The comparison of a document with an output notices what is missing; other figures it takes over."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from conmoe_edge.cli.main import main
from tools.refresh_documents import BLOCK, BY_NAME, printed_now, text_of

OUTPUT = (
    "Head\n  all     8,176  3.556   ×1.001\n  layer 1\n   0  ░●▒●\nq4   96  ━━━━\nEnd 1.2 MiB\n"
)


def test_figures_blanks_and_drawings_may_differ_and_are_taken_over() -> None:
    block = "all  7,000 3.1 ×9.9\n\n 12 █●\n  q4  64  ━━\nEnd 9 MiB\n"
    assert (
        printed_now(block, OUTPUT)
        == "  all     8,176  3.556   ×1.001\n\n   0  ░●▒●\nq4   96  ━━━━\nEnd 1.2 MiB\n"
    )


@pytest.mark.parametrize("block", ["Tail", "End 1.2 KiB", "End 1.2 MiB\nHead", "all 1 2"])
def test_words_units_and_order_may_not(block: str) -> None:
    with pytest.raises(ValueError, match="no longer printed"):
        printed_now(block, OUTPUT)


def test_the_quick_starts_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one command with an answer that takes a second; ``test_walk.py`` has the others."""
    page = BY_NAME["docs/quick-start.md"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONMOE_CACHE_DIR", str(tmp_path / "cache"))
    done = CliRunner().invoke(main, page.answers[0].split())
    assert done.exit_code == 0, done.stderr
    printed_now(BLOCK.findall(text_of(page))[0], done.stdout)
