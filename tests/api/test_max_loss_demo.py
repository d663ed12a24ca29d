"""``fit demo --max-loss`` through the command line, with real fits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from conmoe_edge.api.fitting_loss import MOST_FITS, rise_of
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
from conmoe_edge.cli.main import main

FEW = ["--gpu", "2GiB", "--device", "cpu", "--calibration-tokens", "2048", "--passes", "1"]


def run(out: Path, nats: str) -> Result:
    words = ["fit", "demo", "--max-loss", nats, *FEW, "--out", str(out), "--yes", "--json"]
    return CliRunner().invoke(main, words)


def found(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_smallest_of_those_that_keep_to_it(tmp_path: Path) -> None:
    value = found(run(tmp_path / "out", "0.02"))
    assert rise_of(value["receipt"]) <= 0.02
    tried = value["max_loss_fits"]
    assert 1 <= len(tried) <= MOST_FITS
    keeping = [one["bits"] for one in tried if one["rise"] <= 0.02]
    assert value["plan"]["chosen"]["bits"] == pytest.approx(min(keeping), abs=0.01)
    verify_package(tmp_path / "out", deep=True)
    assert load_manifest(tmp_path / "out").receipt == value["receipt"]
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_no_package_keeps_to_is_refused_with_what_would_do(tmp_path: Path) -> None:
    refused = run(tmp_path / "out", "0.00001")
    assert refused.exit_code == 2 and list(tmp_path.iterdir()) == []
    error = json.loads(refused.stdout)["error"]
    assert "No package of demo" in error["what"]
    (nats,) = re.findall(r"--max-loss (\S+)", error["fix"])
    value = found(run(tmp_path / "out", nats))
    assert rise_of(value["receipt"]) <= float(nats)
