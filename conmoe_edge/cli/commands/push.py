"""``conmoe-edge push DIR NAME``: a package to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from conmoe_edge.cli.ui.cli_options import common_options
from conmoe_edge.cli.ui.text import path_text

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output


@click.command(short_help="Publish a package on the hub, with its receipt as the model card.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("name", metavar="NAME")
@click.option("--public", is_flag=True, help="Let everybody see it.  [default: only its owner]")
@click.option("--revision", metavar="BRANCH", help="Branch to write to; made if it is not there.")
@click.option(
    "--dry-run", is_flag=True, help="Show the model card and the files, and send nothing."
)
@common_options
def push(
    folder: Path, name: str, public: bool, revision: str | None, dry_run: bool, output: Output
) -> None:
    """Publish the package DIR as NAME (owner/name) on the hub, in one commit.

    The model card is made from the manifest: what was done, what it cost in quality, how to run
    it. Every checksum is compared first. A new repository is private unless --public is given.

    \b
    Examples:
      conmoe-edge push ./out org/olmoe-8gb --dry-run
      conmoe-edge push ./out org/olmoe-8gb --public
    """
    from conmoe_edge import api
    from conmoe_edge.units import human_size

    done = api.push(folder, name, public=public, revision=revision, dry_run=dry_run)
    output.value(
        {
            "package": str(folder),
            "name": done.hub_id,
            "public": public,
            "dry_run": dry_run,
            "url": done.url,
            "commit": done.commit,
            "files": list(done.files),
            "bytes": done.nbytes,
            "card": done.card,
            "notes": list(done.notes),
        }
    )
    for note in done.notes:
        output.result(note)
    size = f"{len(done.files)} files, {human_size(done.nbytes)}"
    if dry_run:
        if not output.as_json:
            output.stream(done.card)
        output.result(f"Would publish {path_text(folder)} as {done.hub_id}: {size}.")
    else:
        output.result(f"Published {done.url} ({size}).")
        output.result(f"Fetch it: conmoe-edge pull {done.hub_id}")
