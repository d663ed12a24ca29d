"""docs/quick-start.md, command after command in an empty folder, prints what it says, apart from figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from docs.printed import blocks, check_printed

from conmoe_edge.cli.main import main

PLAN, QUALITY, ANSWER = blocks("quick-start.md")


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONMOE_CACHE_DIR", str(tmp_path / "cache"))


def run(line: str) -> Result:
    done = CliRunner().invoke(main, line.split())
    assert done.exit_code == 0, done.stderr
    return done


def test_the_plan() -> None:
    check_printed(PLAN, run("plan demo --gpu 562MB --device cpu").stdout)


@pytest.mark.slow
def test_the_fit_and_the_answer() -> None:
    check_printed(QUALITY, run("fit demo --gpu 562MB --device cpu").stdout)
    words = ["chat", "./out", "--prompt", "The old house", "--max-tokens", "24", "--temperature"]
    answer = CliRunner().invoke(main, [*words, "0"])
    check_printed(ANSWER, answer.stderr)
    run("inspect ./out --html report.html")
    assert Path("report.html").stat().st_size > 0
