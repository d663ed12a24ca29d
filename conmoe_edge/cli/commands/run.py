"""``conmoe-edge run MODEL``: plan, fit into the user's data folder, chat; asked once."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conmoe_edge.cli.ui.cli_options import common_options, lever_options, plan_request
from conmoe_edge.cli.ui.confirm import confirmed
from conmoe_edge.cli.ui.error_text import Interrupted
from conmoe_edge.cli.ui.name_completion import complete_model
from conmoe_edge.cli.ui.text import path_text
from conmoe_edge.errors import ConmoeError, UsageError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.plan.request import PlanRequest


@click.command(short_help="Fit a model into this machine, and talk to it.")
@click.argument("model", shell_complete=complete_model)
@lever_options
@click.option("--prompt", "-p", metavar="TEXT", help="Answer this once and leave.")
@click.option("--system", metavar="TEXT", default="", help="System text before the conversation.")
@click.option("--yes", "-y", is_flag=True, help="Fit without asking.")
@common_options
@click.pass_context
def run(
    ctx: click.Context,
    model: str,
    prompt: str | None,
    system: str,
    yes: bool,
    output: Output,
    **parameters: Any,
) -> None:
    """Talk to MODEL: an alias (demo, olmoe, ...), a model on the hub, a folder, or a package.

    What `fit` would do is shown and asked about once. The package is kept in your data folder, so
    that the same command talks to it at once from then on; `list` shows what is kept, `rm` removes it.

    \b
    Examples:
      conmoe-edge run demo
      conmoe-edge run olmoe --gpu 8GB
      conmoe-edge run demo --yes --prompt "Name three rivers."
    """
    from conmoe_edge.api.shelf import package_place, packages_folder
    from conmoe_edge.cli.commands.chat import chat

    if prompt is None and output.as_json and sys.stdin.isatty():
        raise UsageError("--json answers once and needs a question.", "", "--prompt TEXT")
    request = plan_request(parameters)
    if request.engine is not None:
        raise UsageError(
            f"run talks to the package here, and --for {request.engine} makes it for another engine.",
            "",
            f"conmoe-edge fit {model} --for {request.engine} --out DIR",
        )
    for place in (Path(model), packages_folder() / model):
        if (place / "conmoe.json").is_file():
            break
    else:
        place = package_place(model, request)
    if not (place / "conmoe.json").is_file():
        _fit(model, place, request, parameters, output, yes=yes)
    ctx.invoke(chat, folder=place, prompt=prompt, system=system)


def _fit(
    model: str,
    place: Path,
    request: PlanRequest,
    parameters: dict[str, Any],
    output: Output,
    *,
    yes: bool,
) -> None:
    """Ask, and make the package.

    Raises:
        Interrupted: the answer was no, or Ctrl-C.
    """
    from conmoe_edge import api
    from conmoe_edge.cli.commands.plan import say_where_it_looks
    from conmoe_edge.cli.views.plan_views import plan_view
    from conmoe_edge.memory.machine import disk_free_if_readable

    places = {
        name: parameters[name]
        for name in ("revision", "offline", "keep_source", "keep_vision", "passes")
    }
    say_where_it_looks(output, model, offline=parameters["offline"])
    report = api.plan(model, request, **places)
    output.note(plan_view(report, place, disk_free_if_readable(place)))
    output.note()
    if not yes:
        _ask(output, place, model)
    _in_a_process_of_its_own(model, place, request, places, output)
    output.note(f"Kept in {path_text(place)}; conmoe-edge rm {place.name} removes it.")
    output.note()


def _in_a_process_of_its_own(
    model: str, place: Path, request: PlanRequest, places: dict[str, Any], output: Output
) -> None:
    """``fit``, whose memory goes back to the system at its end: the budget of what follows counts all of this process.

    Raises:
        ConmoeError: what ``fit`` raises.
        Interrupted: Ctrl-C.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    looks = {"as_json": output.as_json, "quiet": output.quiet}
    child = context.Process(target=_child, args=(model, place, request, places, looks, there))
    child.start()
    there.close()
    try:
        error = here.recv()
    except EOFError:
        error = ConmoeError(
            "The fit ended without a word.",
            f"exit code {_code_of(child)}; -9 means that the system ended it, mostly for want of memory",
            "run the same command to go on where it was, with less beside it",
        )
    except KeyboardInterrupt:
        child.join()
        raise Interrupted("Stopped. Run the same command to go on.") from None
    child.join()
    if error is not None:
        raise error


def _code_of(child: BaseProcess) -> int | None:
    child.join()
    return child.exitcode


def _child(
    model: str,
    place: Path,
    request: PlanRequest,
    places: dict[str, Any],
    looks: dict[str, bool],
    parent: Connection,
) -> None:
    from conmoe_edge import api
    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.cli.ui.progress import ProgressView

    view = ProgressView(Output(**looks))
    try:
        with view:
            api.fit(model, place, request, **places, progress=view.update)
    except ConmoeError as error:
        parent.send(error)
    except KeyboardInterrupt:
        return  # the parent had it, too
    else:
        parent.send(None)


def _ask(output: Output, place: Path, model: str) -> None:
    if output.as_json or not sys.stdin.isatty():
        raise UsageError(
            f"{model} has not been fitted yet, and nobody is there to ask.",
            "run fits it first, which takes time and disk",
            f"conmoe-edge run {model} --yes",
        )
    if not confirmed(f"Fit it into {path_text(place)}, and talk to it?", output, default=True):
        raise Interrupted("Nothing was written.")
