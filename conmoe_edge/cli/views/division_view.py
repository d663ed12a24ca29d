"""How a fit divided the bytes among the experts, as a small histogram that rich can print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conmoe_edge.cli.ui.text import percent_whole
from conmoe_edge.units import human_size

if TYPE_CHECKING:
    from conmoe_edge.api import FitReport

_LONGEST = 24


def division_view(report: FitReport) -> RenderableType:
    """Kinds and widths of the prototypes, the largest records first, and how many experts went."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for number in range(6):
        table.add_column(justify="left" if number in (0, 5) else "right", no_wrap=True)
    header = ("  Bits", "neurons", "prototypes", "size", "of the routing", "")
    table.add_row(*(Text(cell, style="bold") for cell in header))
    most = max((one.prototypes for one in report.division), default=1)
    kept = 0
    for one in report.division:
        kept += one.prototypes
        bar = "━" * max(1, round(_LONGEST * one.prototypes / most))
        table.add_row(
            Text(f"  {one.kind}"),
            Text(f"{one.width:,}"),
            Text(f"{one.prototypes:,}"),
            Text(human_size(one.nbytes)),
            Text(percent_whole(one.weight)),
            Text(bar, style="cyan"),
        )
    gone = report.plan.anatomy.expert_count - kept
    note = f"  {report.plan.plan.chosen.bits:.2f} bits a weight of the original's experts"
    if gone:
        note += f"; {gone:,} of {gone + kept:,} experts are prototypes of others or constants now"
    return Group(table, Text(f"{note}.", style="dim"))
