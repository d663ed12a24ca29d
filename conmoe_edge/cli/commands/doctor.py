"""``conmoe-edge doctor``: what this machine has and what is wrong with it, each with its fix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from conmoe_edge.cli.ui.cli_options import common_options

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output


@click.command(short_help="Check this machine, and say how to mend what is wrong.")
@click.option(
    "--folder",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where packages will lie.  [default: the current folder]",
)
@click.option(
    "--disk-speed",
    is_flag=True,
    help="Measure how fast that folder reads: writes 256 MiB for a moment.",
)
@common_options
@click.pass_context
def doctor(ctx: click.Context, folder: Path, disk_speed: bool, output: Output) -> None:
    """Check what this machine has and what is wrong with it.

    One line a finding: ok, info, warn (works, but not as well as it could) or fail, with the fix
    under it. Exit status 1 if anything fails.

    \b
    Examples:
      conmoe-edge doctor
      conmoe-edge doctor --folder /mnt/models --disk-speed
      conmoe-edge doctor --json
    """
    from conmoe_edge.api.diagnosing import findings
    from conmoe_edge.cli.views.plan_views import finding_view

    found = []
    for finding in findings(folder, disk_speed=disk_speed):
        found.append(finding)
        output.result(finding_view(finding))
    failed = sum(one.status == "fail" for one in found)
    warned = sum(one.status == "warn" for one in found)
    output.value({"ok": failed == 0, "checks": [one.to_json() for one in found]})
    output.note()
    output.note(_verdict(failed, warned))
    if failed:
        ctx.exit(1)


def _verdict(failed: int, warned: int) -> str:
    if failed:
        return f"{failed} to mend" + (f", {warned} to look at" if warned else "") + "."
    return f"Ready, {warned} to look at." if warned else "Ready."
