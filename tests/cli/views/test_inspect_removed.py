"""What ``inspect`` says was removed: experts, or weights of experts that are mostly still there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from families import tiny_model
from hand_packages import identity, thirds, write_package

from conmoe_edge.checkpoint.format.manifest import SlotRecord
from conmoe_edge.cli.views.inspect_view import _removed, experts_lines, slots_line
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


def test_what_became_of_the_experts_is_said_in_short_lines(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    slots = thirds(model)
    one = {**slots, 0: (*slots[0][:-1], SlotRecord(None))}
    facts = summarise(write_package(model, tmp_path / "package", one))
    lines = experts_lines(facts)
    kept = len(facts.prototypes)
    assert lines[0] == f"{kept} of 24 experts are left with all of their neurons"
    assert lines[1].endswith(f"; 32.00 bits a weight became {32 * kept / 24:.2f}")
    assert all(len(line) <= 71 for line in lines)  # beside nine columns of a label
    assert slots_line(facts).endswith("1 was dropped")
    assert experts_lines(replace(facts, manifest=replace(facts.manifest, method="unchanged"))) == []
