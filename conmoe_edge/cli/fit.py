"""``conmoe-edge fit MODEL``: measure, plan, consolidate, write the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conmoe_edge.cli._errors import Interrupted
from conmoe_edge.cli._options import Tokens, common_options, lever_options, levers
from conmoe_edge.errors import ConmoeError, UsageError

if TYPE_CHECKING:
    from conmoe_edge.api import FitReport, PlanReport
    from conmoe_edge.cli._output import Output
    from conmoe_edge.cli._progress import ProgressView


@click.command(short_help="Fit a model into the memory you have, and write it.")
@click.argument("model")
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out"),
    show_default=True,
    help="Folder to write; it is whole or absent, never half there.",
)
@lever_options
@click.option(
    "--method",
    metavar="NAME",
    default="conmoe",
    show_default=True,
    help="How prototypes are chosen and slots reassigned.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Plain text to calibrate on; best is text like what you will ask.  [default: a text that "
    "comes along]",
)
@click.option(
    "--calibration-tokens",
    metavar="N",
    type=Tokens(),
    help="How many tokens of it to use; more is slower and steadier.",
)
@click.option("--seed", metavar="N", type=int, default=0, hidden=True, help="Seed of the sampling.")
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--fresh", is_flag=True, help="Start over instead of going on where a run stopped.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is there.")
@click.option("--yes", "-y", is_flag=True, help="Answer yes to every question.")
@common_options
def fit(model: str, out: Path, output: Output, dry_run: bool, yes: bool, **parameters: Any) -> None:
    """Fit MODEL into a memory budget and write a package that `chat` runs.

    MODEL is an alias (demo, olmoe, ...), a model on the hub (owner/name) or a folder with
    safetensors files. The plan takes the mildest change that fits, and none if the model fits as it
    is. A run that stops goes on where it was when the same command is given again.

    \b
    Examples:
      conmoe-edge fit demo --gpu 600MB
      conmoe-edge fit olmoe --gpu 8GB --out ./olmoe-8gb
      conmoe-edge fit olmoe --gpu rtx-4060-laptop-8gb --rate 50% --scope 2 --calibration notes.txt
      conmoe-edge fit ./my-checkpoint --gpu 16GB --dry-run --json
    """
    from conmoe_edge import api
    from conmoe_edge.cli._progress import ProgressView

    if dry_run:
        from conmoe_edge.cli.plan import show_plan

        show_plan(output, api.plan(model, **levers(parameters)), out)
        output.note("Dry run: nothing was written.")
        return
    if parameters["overwrite"] and not yes:
        _confirm_foreign_folder(out)

    def on_plan(report: PlanReport) -> None:
        from conmoe_edge.cli._render import plan_view
        from conmoe_edge.cli.plan import free_disk

        output.note(plan_view(report, out, free_disk(out)))
        output.note()

    view = ProgressView(output)
    try:
        with view:
            report = api.fit(
                model,
                out,
                **levers(parameters),
                method=parameters["method"],
                calibration=parameters["calibration"],
                calibration_tokens=parameters["calibration_tokens"],
                seed=parameters["seed"],
                fresh=parameters["fresh"],
                overwrite=parameters["overwrite"],
                on_plan=on_plan,
                progress=view.update,
            )
    except KeyboardInterrupt:
        raise Interrupted(_stopped(view)) from None
    _show(output, report)


def _confirm_foreign_folder(out: Path) -> None:
    """``--overwrite`` on a folder that this program did not write deserves a question."""
    try:
        foreign = any(out.iterdir()) and not (out / "conmoe.json").exists()
    except (FileNotFoundError, NotADirectoryError):
        return
    if not foreign:
        return
    question = f"{out} was not written by conmoe-edge. Delete it with everything in it?"
    if not sys.stdin.isatty():
        raise UsageError(
            f"{out} was not written by conmoe-edge.",
            "--overwrite would delete it with everything in it, and there is no terminal to ask on",
            "another --out, or --overwrite --yes if that is what you want",
        )
    if not click.confirm(question, err=True):
        raise ConmoeError("Nothing was changed.", "", "another --out DIR")


def _stopped(view: ProgressView) -> str:
    """What a stop leaves, in one sentence."""
    again = "run the same command to go on, or --fresh to start over."
    if view.stage in ("", "locate") or view.layers_done == 0:
        return f"Stopped before the first layer. Nothing was written yet: {again}"
    if view.layers_done < view.layers:
        return f"Stopped after layer {view.layers_done} of {view.layers}. Nothing is lost: {again}"
    return f"Stopped after all {view.layers} layers were calibrated. Nothing is lost: {again}"


def _show(output: Output, report: FitReport) -> None:
    """Receipt and the next command."""
    from conmoe_edge.cli._render import receipt_view
    from conmoe_edge.cli._text import duration, path_text
    from conmoe_edge.units import human_size

    output.value(report.to_json())
    receipt = receipt_view(report.receipt)
    if receipt is not None:
        output.result(receipt)
        output.result("")
    where = path_text(report.out)
    took = sum(report.seconds.values())
    output.result(
        f"Wrote {where} ({human_size(report.bytes_written)}) in {duration(took)}. "
        f"Try:  conmoe-edge chat {where}"
    )
