"""What ``models`` prints: a line a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conmoe_edge.cli.ui.text import path_text, percent, percent_whole
from conmoe_edge.cli.views.plan_views import precision_name, table_view
from conmoe_edge.units import human_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from conmoe_edge.api.listing import ModelRow


def models_view(rows: tuple[ModelRow, ...], *, planned: bool) -> RenderableType:
    """A row a model; ``planned``: how each would fit."""
    headers = ("name", "on this disk", "how it would fit" if planned else "model")
    table = []
    for row in rows:
        size = "" if row.nbytes is None else human_size(row.nbytes)
        here = "partly" if row.here == "partly" else size
        last = _fits(row) if planned else _target(row)
        table.append((row.name + (" (yours)" if row.own else ""), here, last))
    return table_view(headers, table, numbers=frozenset({1}))


def _target(row: ModelRow) -> str:
    if row.problem is not None:
        return f"{row.target}: not there"
    if row.target.startswith("package:"):
        return "comes along"
    return "" if row.target == row.name else _short(row.target)


def _short(target: str) -> str:
    return path_text(target) if Path(target).is_absolute() else target


def _fits(row: ModelRow) -> str:
    """``25 % removed, int4, 87 % resident, ~12 tok/s``."""
    if row.problem is not None:
        return row.problem.what
    if row.report is None:
        return "–"
    plan = row.report.plan
    chosen = plan.chosen
    parts = ["fits unchanged"] if plan.unchanged else [f"in {precision_name(chosen.precision)}"]
    if chosen.bits:
        parts = [f"in {chosen.bits:.2g} bits"]
    if chosen.rate:
        parts.append(f"{percent(chosen.rate)} removed")
    if chosen.resident_share < 1:
        parts.append(f"{percent_whole(chosen.resident_share)} resident")
    if chosen.tokens_per_second is not None:
        parts.append(f"~{chosen.tokens_per_second:.3g} tok/s")
    return ", ".join(parts)
