"""What ``inspect`` says was removed: experts, or weights of experts that are mostly still there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from families import tiny_model
from hand_packages import identity, thirds, write_package

from conmoe_edge.cli.views.inspect_view import _removed
from conmoe_edge.report.package_summary import summarise


@pytest.mark.parametrize(
    ("slots", "rate", "words"),
    [
        (thirds, 0.625, "62.5 % fewer experts"),
        (identity, 0.25, "25 % fewer expert weights"),
        (identity, 0.0, "nothing removed"),
    ],
    ids=["fewer", "narrower", "none"],
)
def test_the_share_is_of_what_went(slots, rate: float, words: str, tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    facts = summarise(write_package(model, tmp_path / "package", slots(model)))
    assert _removed(replace(facts, manifest=replace(facts.manifest, rate=rate))) == words
