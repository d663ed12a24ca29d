"""``conmoe-edge rm NAME``: what ``list`` shows, removed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from conmoe_edge.cli.ui.cli_options import common_options
from conmoe_edge.cli.ui.confirm import confirmed
from conmoe_edge.cli.ui.error_text import Interrupted
from conmoe_edge.errors import UsageError

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output


@click.command(name="rm", short_help="Remove a package that run made, or a model from the cache.")
@click.argument("name", metavar="NAME")
@click.option("--yes", "-y", is_flag=True, help="Remove without asking.")
@common_options
def remove(name: str, yes: bool, output: Output) -> None:
    """Remove NAME, as `list` shows it: a package in your data folder, or a model in the hub's cache.
    Folders of your own are never touched.

    \b
    Examples:
      conmoe-edge rm demo
      conmoe-edge rm allenai/OLMoE-1B-7B-0924 --yes
    """
    from conmoe_edge.api import shelf
    from conmoe_edge.cli.ui.text import printable
    from conmoe_edge.units import human_size

    found = shelf.find_kept(name)
    size = human_size(sum(one.nbytes for one in found))
    what = printable(f"{' and '.join(one.kind for one in found)} {found[0].name} ({size})")
    if not yes:
        if output.as_json or not sys.stdin.isatty():
            raise UsageError(
                f"The {what} would be removed, and nobody is there to ask.", "", "--yes"
            )
        if not confirmed(f"Remove the {what}?", output):
            raise Interrupted("Nothing was removed.")
    for one in found:
        shelf.remove(one)
    output.value({"removed": [one.to_json() for one in found]})
    output.result(f"Removed the {what}.")
