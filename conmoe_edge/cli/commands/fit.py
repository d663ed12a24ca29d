"""``conmoe-edge fit MODEL``: measure, plan, consolidate, write the package."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conmoe_edge.cli.ui.cli_options import (
    common_options,
    file_option,
    lever_options,
    number_option,
    plan_request,
    tokens_option,
)
from conmoe_edge.cli.ui.error_text import Interrupted
from conmoe_edge.cli.ui.name_completion import complete_model
from conmoe_edge.cli.ui.text import path_text
from conmoe_edge.errors import OutputExists, UsageError

if TYPE_CHECKING:
    from conmoe_edge.api import FitReport, PlanReport
    from conmoe_edge.api.fitting_loss import Tried
    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.cli.ui.progress import ProgressView


@click.command(short_help="Fit a model into the memory you have, and write it.")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out"),
    show_default=True,
    help="Folder to write; it is whole or absent, never half there.",
)
@lever_options
@file_option(
    "--calibration",
    "Plain text to calibrate on; best is text like what you will ask.  [default: a text that "
    "comes along]",
)
@tokens_option("--calibration-tokens", "How many tokens of it to use; more is slower and steadier.")
@number_option(
    "--seed",
    "Which parts of the calibration text are used: 0 spreads them evenly, others draw them.",
    least=0,
    default=0,
)
@click.option(
    "--max-loss",
    metavar="NATS",
    type=float,
    help="Write the smallest package whose held-out loss rises by no more; takes several fits, each measured.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--fresh", is_flag=True, help="Start over instead of going on where a run stopped.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is there.")
@click.option(
    "--no-tokenizer",
    is_flag=True,
    help="Write the package even if the model has no tokenizer; only where it fits as it is.",
)
@click.option("--yes", "-y", is_flag=True, help="Answer yes to every question.")
@common_options
def fit(model: str, out: Path, output: Output, dry_run: bool, yes: bool, **parameters: Any) -> None:
    """Fit MODEL into a memory budget and write a package that `chat` runs.

    MODEL is an alias (demo, olmoe, ...), a model on the hub (owner/name) or a folder with
    safetensors files. The plan takes the mildest change that fits, and none if the model fits as it
    is. A run that stops goes on where it was when the same command is given again.

    \b
    Examples:
      conmoe-edge fit demo --gpu 562MB --device cpu
      conmoe-edge fit olmoe --gpu 8GB --out ./olmoe-8gb
      conmoe-edge fit olmoe --gpu rtx-4060-laptop-8gb --rate 50% --scope 2 --calibration notes.txt
      conmoe-edge fit ./my-checkpoint --gpu 16GB --dry-run --json
      conmoe-edge fit ./my-checkpoint --gpu 24GB --for vllm --out ./served
    """
    from conmoe_edge import api
    from conmoe_edge.cli.ui.progress import ProgressView

    request, max_loss = plan_request(parameters), parameters["max_loss"]
    if dry_run and max_loss is not None:
        raise UsageError(
            "--max-loss says nothing without fits.",
            "what a package loses is known when it has been made and measured",
            "leave out --dry-run; plan shows what earlier fits of this model lost",
        )
    places = ("revision", "offline", "keep_source", "keep_vision", "passes")
    place = {name: parameters[name] for name in places}
    if dry_run:
        from conmoe_edge.cli.commands.plan import say_where_it_looks, show_plan

        say_where_it_looks(output, model, offline=parameters["offline"])
        report = api.plan(model, request, **place)
        show_plan(output, report, out)
        output.note("Dry run: nothing was written.")
        return
    overwrite = _may_replace(out, output, overwrite=parameters["overwrite"], yes=yes)

    def on_plan(report: PlanReport) -> None:
        from conmoe_edge.cli.views.plan_views import plan_view
        from conmoe_edge.memory.machine import disk_free_if_readable

        output.note(plan_view(report, out, disk_free_if_readable(out)))
        output.note()

    view = ProgressView(output)
    try:
        with view:
            options = {
                **place,
                "calibration": parameters["calibration"],
                "seed": parameters["seed"],
                "fresh": parameters["fresh"],
                "overwrite": overwrite,
                "no_tokenizer": parameters["no_tokenizer"],
                "on_plan": on_plan,
                "progress": view.update,
            }
            tried: tuple[Tried, ...] = ()
            if max_loss is None:
                report = api.fit(model, out, request, **options)
            else:
                report, tried = api.fit_within_loss(model, out, max_loss, request, **options)
    except KeyboardInterrupt:
        raise Interrupted(_stopped(view)) from None
    _show(output, report, tried)


def _may_replace(out: Path, output: Output, *, overwrite: bool, yes: bool) -> bool:
    """Whether a package at ``out`` may be replaced; on a terminal that is asked, before any work.

    Raises:
        OutputExists: it is there, and was not released for replacement.
    """
    if overwrite or not (out / "conmoe.json").exists():
        return overwrite
    where = path_text(out)
    if not output.as_json and sys.stdin.isatty():
        try:
            agreed = yes or click.confirm(f"{where} is a package already. Replace it?", err=True)
        except click.Abort:
            output.note()  # closes the line of the question
            raise Interrupted("Stopped. Nothing was changed.") from None
        if agreed:
            return True
        raise OutputExists("Nothing was changed.", "", "another --out DIR")
    raise OutputExists(
        f"{where} is a package already.", "", "--overwrite to replace it, or another --out DIR"
    )


def _stopped(view: ProgressView) -> str:
    """What a stop leaves, in one sentence or two."""
    again = "run the same command to go on, or --fresh to start over."
    if view.layers_done == 0 and view.stage != "receipt":
        return "Stopped before the first layer was done. Run the same command to start again."
    if view.stage in ("receipt", "verify"):
        return f"Stopped after the last layer, while it was checked. Nothing is lost: {again}"
    return f"Stopped after layer {view.layers_done} of {view.layers}. Nothing is lost: {again}"


def _show(output: Output, report: FitReport, tried: tuple[Tried, ...]) -> None:
    """Receipt and the next command."""
    from conmoe_edge.cli.ui.text import duration
    from conmoe_edge.cli.views.division_view import division_view
    from conmoe_edge.cli.views.plan_views import receipt_view
    from conmoe_edge.plan.reasons import keeps_every_weight
    from conmoe_edge.units import human_size

    fits = {"max_loss_fits": [asdict(one) for one in tried]} if tried else {}
    output.value({**report.to_json(), **fits})
    for one in tried:
        output.result(f"Measured: {one.bits:.2f} bits a weight lose {one.rise:+.4f} nats.")
    receipt = receipt_view(report.receipt)
    if receipt is not None:
        output.result(receipt)
        output.result("")
    if report.plan.plan.chosen.bits:
        output.result(division_view(report))
        output.result("")
    for note in report.notes:
        output.result(f"Note: {note}")
    where = path_text(report.out)
    size = human_size(report.bytes_written)
    if report.plan.plan.unchanged and not report.receipt:
        size = "the model as it is, its weights linked"
    elif keeps_every_weight(report.plan.anatomy, report.plan.plan):
        size += ", every weight as in the model"
    took = duration(sum(report.seconds.values()))
    output.result(f"Wrote {where} ({size}) in {took}. Try:  conmoe-edge chat {where}")
