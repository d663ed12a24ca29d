"""The benchmarks of prototypes that come from the disk run, and compare what they measure with all resident."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks import miss_cost, prompt_from_disk  # noqa: E402
from benchmarks.comparison.random_package import write  # noqa: E402
from benchmarks.make_olmoe_shape import Shape  # noqa: E402
from conmoe_edge.integrations.load import load_package  # noqa: E402

SHAPE = Shape(layers=3, experts=8, top_k=2, hidden=128, expert_width=64, heads=4, vocab=4096)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write(dict(SHAPE.config()), tmp_path / "package", "int4", "q4")
    return tmp_path / "package"


def test_what_a_miss_costs(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models: list[Any] = [
        load_package(package, device="cpu", context=64, slots=slots) for slots in (None, (9,))
    ]
    miss_cost.measure(*models, tokens=12, turns=1)
    for model in models:
        model.conmoe.close()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert "9 of 24 have a slot" in head
    assert [row.split()[0] for row in rows] in (["buffered"], ["buffered", "direct"])
    assert all(float(row.split()[1]) > 0 for row in rows)


def test_a_prompt_reads_each_record_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prompt_from_disk", "--tokens", "48", "--turns", "1"])
    monkeypatch.setattr(prompt_from_disk, "Shape", lambda **_: SHAPE)
    prompt_from_disk.main()
    _, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows] == ["yes", "no"]
    assert all(row[:2] == ["48", "48"] and row[6] == "1" for row in rows)
