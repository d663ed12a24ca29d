"""``conmoe-edge pull NAME``: a package from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from conmoe_edge.cli.ui.cli_options import common_options
from conmoe_edge.cli.ui.text import path_text
from conmoe_edge.errors import UsageError

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output


@click.command(short_help="Fetch a package from the hub, or a model to fit.")
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
@click.option(
    "--source",
    is_flag=True,
    help="Fetch a model, whole, into the hub's cache; fit reads it there. An alias always means that.",
)
@common_options
def pull(
    name: str,
    out: Path | None,
    revision: str | None,
    overwrite: bool,
    fresh: bool,
    source: bool,
    output: Output,
) -> None:
    """Fetch the package NAME (owner/name) that `push` put on the hub, or the model that an alias means.

    Only the files that its manifest lists are fetched, and each is checked against its checksum
    before the folder appears. A fetch that stops goes on when the same command is given again.

    \b
    Examples:
      conmoe-edge pull org/olmoe-8gb
      conmoe-edge pull org/olmoe-8gb --out ./olmoe --revision v1
      conmoe-edge pull olmoe
      conmoe-edge pull allenai/OLMoE-1B-7B-0924 --source
    """
    from conmoe_edge.checkpoint.sources.model_names import aliases

    if source or name.lower() in aliases():
        _pull_source(name, revision, output, out=out)
        return
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


def _pull_source(name: str, revision: str | None, output: Output, *, out: Path | None) -> None:
    """A model into the hub's cache, with the bars of the hub's own library."""
    from conmoe_edge.checkpoint.sources.locate import locate
    from conmoe_edge.cli.commands.plan import say_where_it_looks
    from conmoe_edge.units import human_size

    if out is not None:
        raise UsageError(
            "--out is for packages.",
            "a model goes into the hub's cache, where fit looks for it",
            "leave --out out",
        )
    say_where_it_looks(output, name, offline=False)
    found = locate(name, revision=revision)
    nbytes = sum(path.stat().st_size for path in found.path.glob("*.safetensors"))
    output.value(
        {
            "out": str(found.path),
            "name": found.hub_id or name,
            "commit": found.revision,
            "bytes": nbytes,
        }
    )
    output.result(f"{name} is in {path_text(found.path)} ({human_size(nbytes)} of weights).")
    output.result(f"Fit it: conmoe-edge fit {name} --gpu SIZE, or conmoe-edge run {name}")
