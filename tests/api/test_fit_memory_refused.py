"""A fit that this machine has too little RAM for is refused before anything is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from free_fits import fit, prepare

from conmoe_edge import api
from conmoe_edge.errors import OutOfMemory
from conmoe_edge.memory.machine import measure_machine
from conmoe_edge.plan.request import SEQUENCE_LENGTH

FAR_TOO_MANY = 1 << 40


def test_more_tokens_than_there_is_ram_for(tmp_path: Path) -> None:
    source = prepare("olmoe", tmp_path)
    settings = {"rate": 0.5, "precision": "source"}
    with pytest.raises(OutOfMemory) as caught:
        fit(source, tmp_path / "out", calibration_tokens=FAR_TOO_MANY, **settings)
    assert not (tmp_path / "out").exists()
    found = re.fullmatch(r"--calibration-tokens (\d+)", caught.value.fix)
    assert found is not None, caught.value.fix

    def need(tokens: int) -> int:
        report = api.plan(
            str(source), budget="4GB", device="cpu", calibration_tokens=tokens, **settings
        )
        assert report.memory is not None
        assert report.to_json()["fit_memory"]["bytes"] == report.memory.nbytes
        return report.memory.nbytes

    limit, tokens = measure_machine().ram_limit, int(found[1])
    assert need(tokens) <= limit < need(tokens + SEQUENCE_LENGTH)


def test_a_model_that_stays_as_it_is_needs_none(tmp_path: Path) -> None:
    source = prepare("olmoe", tmp_path)
    report = api.plan(str(source), budget="4GB", device="cpu")
    assert report.memory is None and report.to_json()["fit_memory"] is None
