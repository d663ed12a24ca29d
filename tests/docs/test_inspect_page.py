"""docs/inspect.md prints what its two commands print, apart from figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from docs.printed import blocks, check_printed

from conmoe_edge.cli.main import main


@pytest.mark.slow
def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit = "fit demo --gpu 2GiB --device cpu --rate 50% --scope 2 --method conmoe"
    done = CliRunner().invoke(main, fit.split())
    assert done.exit_code == 0, done.stderr
    shown = CliRunner().invoke(main, ["inspect", "./out"])
    check_printed(blocks("inspect.md")[0], shown.stdout)
