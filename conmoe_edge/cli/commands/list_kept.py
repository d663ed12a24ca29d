"""``conmoe-edge list``: what ``run`` keeps and what the hub's cache holds, with sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from conmoe_edge.cli.ui.cli_options import common_options

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output


@click.command(name="list", short_help="The packages and models that take room here.")
@common_options
def list_kept(output: Output) -> None:
    """List the packages that `run` made, fits that were not finished, and the models in the hub's
    cache. `models` lists the names that a model can have.

    \b
    Examples:
      conmoe-edge list
      conmoe-edge list --json
    """
    from conmoe_edge.api.shelf import kept, packages_folder
    from conmoe_edge.cli.ui.text import path_text
    from conmoe_edge.cli.views.plan_views import table_view
    from conmoe_edge.units import human_size

    found = kept()
    output.value({"kept": [one.to_json() for one in found], "folder": str(packages_folder())})
    if not found:
        output.result("Nothing is kept here. conmoe-edge run demo makes a first package.")
        return
    rows = [(one.name, human_size(one.nbytes), one.kind, one.note) for one in found]
    output.result(table_view(("name", "size", "", ""), rows, numbers=frozenset({1})))
    output.note()
    output.note(
        f"Packages lie in {path_text(packages_folder())}: conmoe-edge run NAME, conmoe-edge rm NAME. "
        "What fit --out wrote elsewhere is not listed."
    )
