"""``conmoe-edge plan MODEL``: what ``fit`` would do, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conmoe_edge.cli.ui.cli_options import common_options, lever_options, plan_request
from conmoe_edge.cli.ui.name_completion import complete_model

if TYPE_CHECKING:
    from conmoe_edge.api import PlanReport
    from conmoe_edge.cli.ui.output import Output


@click.command(short_help="Show what fit would do, before any download.")
@click.argument("model", shell_complete=complete_model)
@lever_options
@common_options
def plan(model: str, output: Output, **parameters: Any) -> None:
    """Show what fit would do with MODEL, and why.

    MODEL is an alias (demo, olmoe, ...), a model on the hub (owner/name) or a folder. Only its
    configuration is read: no weights are downloaded. The table lists the settings from the mildest
    on, with the reason why each was taken or not.

    \b
    Examples:
      conmoe-edge plan demo --gpu 562MB --device cpu
      conmoe-edge plan allenai/OLMoE-1B-7B-0924 --gpu rtx-3060-12gb --context 16k
      conmoe-edge plan olmoe --gpu 8GB --json
    """
    from conmoe_edge import api

    say_where_it_looks(output, model, offline=parameters["offline"])
    report = api.plan(
        model,
        plan_request(parameters),
        revision=parameters["revision"],
        offline=parameters["offline"],
        keep_source=parameters["keep_source"],
        keep_vision=parameters["keep_vision"],
        passes=parameters["passes"],
    )
    show_plan(output, report, Path("out"))


def say_where_it_looks(output: Output, model: str, *, offline: bool) -> None:
    """A line before the hub is waited for."""
    from conmoe_edge.checkpoint.sources.hub import is_offline
    from conmoe_edge.checkpoint.sources.model_names import resolve
    from conmoe_edge.cli.ui.text import printable

    hub_id = resolve(model).hub_id
    if hub_id is not None and not is_offline(offline):
        output.note(printable(f"Asking the hub about {hub_id} ..."))


def show_plan(output: Output, report: PlanReport, out: Path) -> None:
    """The plan as the command's result."""
    from conmoe_edge.cli.views.plan_views import plan_view
    from conmoe_edge.memory.machine import disk_free_if_readable

    output.value(report.to_json())
    output.result(plan_view(report, out, disk_free_if_readable(out)))
