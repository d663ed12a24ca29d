"""README, quick start, evaluate and inspect, command after command in an empty folder, print what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.refresh_documents import BLOCK, BY_NAME, PAGES, Page, commands, text_of, walk


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_command_of_a_page_prints_what_the_page_says(name: str, tmp_path: Path) -> None:
    wrong = walk(BY_NAME[name], tmp_path / "walk", check=True)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_run_is_in_the_page(page: Page) -> None:
    """An entry of another time would hide a command that nobody runs; every printed block has a command."""
    lines = dict(commands(page))
    assert set(page.elsewhere) <= set(lines), "a command that is not run is no longer there"
    run = {line for line, why in commands(page) if why is None}
    assert set(page.answers) <= run
    assert len(page.answers) == len(BLOCK.findall(text_of(page)))
