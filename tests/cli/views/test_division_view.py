"""How a fit says what became of the experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from rich.console import Console

from conmoe_edge.cli.views.division_view import division_view
from conmoe_edge.compress.quality.division import Division


def shown(divisions: tuple[Division, ...], experts: int) -> str:
    plan = SimpleNamespace(plan=SimpleNamespace(chosen=SimpleNamespace(bits=2.6)))
    report: Any = SimpleNamespace(
        division=divisions,
        plan=SimpleNamespace(plan=plan.plan, anatomy=SimpleNamespace(expert_count=experts)),
    )
    console = Console(width=120, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(division_view(report))
    return captured.get()


def test_every_kind_has_a_row_and_experts_that_went_are_named() -> None:
    rows = (Division("q3-q4", 96, 40, 40 << 20, 0.75), Division("q2", 64, 10, 3 << 20, 0.25))
    text = shown(rows, 64)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["q3-q4", "q2"]
    assert "96" in lines[1] and "40.0 MiB" in lines[1] and "75 %" in lines[1]
    assert lines[1].count("━") > lines[2].count("━") > 0
    assert "14 of 64 experts" in text and "2.60 bits" in text
    assert "experts are" not in shown(rows, 50)
