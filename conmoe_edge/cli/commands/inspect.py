"""``conmoe-edge inspect DIR``: what was done to the experts of a package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from conmoe_edge.cli.ui.cli_options import (
    common_options,
    file_option,
)

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output

_PIPED_WIDTH = 80


@click.command(short_help="Show what was done to the experts of a package.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--verify",
    is_flag=True,
    help="Hash every file and compare with the manifest, and look for numbers that are none.",
)
@file_option(
    "--html", "Write a page with pictures: one file, opens in any browser, needs no network."
)
@file_option(
    "--bench",
    "What `bench DIR --json` printed: puts measured speed and memory beside the planned ones.",
)
@common_options
def inspect(
    folder: Path, verify: bool, html: Path | None, bench: Path | None, output: Output
) -> None:
    """Show what is in the package DIR and what was done to its experts.

    The plan against what was written, the quality receipt, a map of every router slot (how much it
    was used, and whether it kept its expert, shares another's, or became a constant), and the
    busiest and loneliest prototypes. Reads the manifest, no weights.

    \b
    Examples:
      conmoe-edge inspect ./out
      conmoe-edge inspect ./out --html report.html
      conmoe-edge inspect ./out --verify --quiet
      conmoe-edge bench ./out --json > speed.json; conmoe-edge inspect ./out --bench speed.json
      conmoe-edge inspect ./out --json | jq .slots
    """
    from conmoe_edge.cli.commands.chat import check_package
    from conmoe_edge.cli.ui.text import path_text
    from conmoe_edge.cli.views.inspect_view import inspect_view
    from conmoe_edge.report.package_summary import summarise, to_json

    check_package(folder)
    if verify:
        output.note("Hashing the files, and looking at their numbers ...")
    # The curves take seconds, and only the page and the JSON have room for them.
    curves = html is not None or output.as_json
    told = False

    def tell(done: int, of: int) -> None:
        nonlocal told
        if not told:
            output.note("Replaying the routing trace ...")
        told = True

    facts = summarise(folder, verify=verify, bench=bench, curves=curves, tell=tell)
    output.value(to_json(facts))
    width = shutil.get_terminal_size().columns if output.stdout_is_terminal else _PIPED_WIDTH
    output.result(inspect_view(facts, width))
    if html is not None:
        from conmoe_edge.report.page import write_page

        write_page(facts, html)
        output.note(f"\nWritten: {path_text(html)}.")
    elif facts.slots:
        output.note(f"\nAs a page: conmoe-edge inspect {path_text(folder)} --html report.html")
