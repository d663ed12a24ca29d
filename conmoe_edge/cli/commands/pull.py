"""``conmoe-edge pull NAME``: a package from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from conmoe_edge.cli.ui.cli_options import common_options
from conmoe_edge.cli.ui.text import path_text

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output


@click.command(short_help="Fetch a package from the hub, and check it.")
@click.argument("name", metavar="NAME")
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder to write; it is whole or absent.  [default: the last part of NAME]",
)
@click.option("--revision", metavar="R", help="Branch, tag or commit of the package.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is there.")
@click.option("--fresh", is_flag=True, help="Start over instead of going on where a fetch stopped.")
@common_options
def pull(
    name: str,
    out: Path | None,
    revision: str | None,
    overwrite: bool,
    fresh: bool,
    output: Output,
) -> None:
    """Fetch the package NAME (owner/name) that `push` put on the hub.

    Only the files that its manifest lists are fetched, and each is checked against its checksum
    before the folder appears. A fetch that stops goes on when the same command is given again.

    \b
    Examples:
      conmoe-edge pull org/olmoe-8gb
      conmoe-edge pull org/olmoe-8gb --out ./olmoe --revision v1
    """
    from conmoe_edge import api
    from conmoe_edge.units import human_size

    done = api.pull(
        name,
        out,
        revision=revision,
        overwrite=overwrite,
        fresh=fresh,
        on_file=lambda file, number, of: output.note(f"{number} of {of}: {file}"),
    )
    output.value(
        {
            "out": str(done.folder),
            "name": done.hub_id,
            "commit": done.commit,
            "files": list(done.files),
            "bytes": done.nbytes,
        }
    )
    output.result(
        f"Wrote {path_text(done.folder)} ({human_size(done.nbytes)}), all checksums right."
    )
    output.result(f"Talk to it: conmoe-edge chat {path_text(done.folder)}")
