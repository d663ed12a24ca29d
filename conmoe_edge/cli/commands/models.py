"""``conmoe-edge models``: the names that a model can be called by, what is on this disk, and what would fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from conmoe_edge.cli.ui.cli_options import common_options
from conmoe_edge.cli.ui.lazy import SuggestingGroup
from conmoe_edge.cli.ui.name_completion import complete_budget, complete_model, complete_own_alias

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output


@click.group(
    cls=SuggestingGroup,
    invoke_without_command=True,
    short_help="The models that have a name, and what would fit here.",
)
@click.option(
    "--gpu",
    metavar="SIZE|PROFILE|auto",
    shell_complete=complete_budget,
    help="Also say how each model would fit into this memory.",
)
@click.option(
    "--online", is_flag=True, help="With --gpu: ask the hub about models not on this disk."
)
@common_options
@click.pass_context
def models(ctx: click.Context, gpu: str | None, online: bool, output: Output) -> None:
    """Show the names that MODEL can be, yours among them, and which models are on this disk.

    With --gpu every model on this disk is planned for: what would be done so that it fits. No
    socket is opened without --online, which asks the hub about the others (a few kilobytes each).

    \b
    Examples:
      conmoe-edge models
      conmoe-edge models --gpu 8GB
      conmoe-edge models --gpu rtx-4090 --online --json
      conmoe-edge models alias mine ./my-checkpoint
    """
    if ctx.invoked_subcommand is not None:
        return
    from conmoe_edge import api
    from conmoe_edge.checkpoint.sources.user_aliases import alias_file
    from conmoe_edge.cli.ui.text import counted, path_text
    from conmoe_edge.cli.views.models_view import models_view

    rows = api.models(gpu, online=online, on_plan=lambda name: output.note(f"Planning {name} ..."))
    listed = [row.to_json() for row in rows]
    output.value({"models": listed, "aliases_file": str(alias_file()), "budget": gpu})
    shown = rows if gpu is None else tuple(row for row in rows if row.report or row.problem)
    output.result(models_view(shown, planned=gpu is not None))
    output.note()
    where = path_text(alias_file())
    output.note(f"Your own names are in {where}: conmoe-edge models alias NAME TARGET.")
    if len(shown) < len(rows):
        left = counted(len(rows) - len(shown), "model")
        output.note(f"{left} more not on this disk: --online asks the hub about them.")


@models.command(short_help="Give a model a name of your own.")
@click.argument("name")
@click.argument("target", shell_complete=complete_model)
@common_options
def alias(name: str, target: str, output: Output) -> None:
    """Let NAME mean TARGET: a folder, a model on the hub (owner/name, owner/name@revision) or an alias.

    Your names win over those that are shipped. They are lines of a TOML file, whose other lines
    stay as they are.

    \b
    Examples:
      conmoe-edge models alias mine ./my-checkpoint
      conmoe-edge models alias coder Qwen/Qwen3-Coder-30B-A3B-Instruct
    """
    from conmoe_edge.checkpoint.sources.user_aliases import add_alias, alias_file

    value = add_alias(name, target)
    output.value({"name": name.strip().lower(), "target": value, "aliases_file": str(alias_file())})
    output.result(_said(f"{name.strip().lower()} now means {value}."))


@models.command(short_help="Forget a name of your own.")
@click.argument("name", shell_complete=complete_own_alias)
@common_options
def unalias(name: str, output: Output) -> None:
    """Forget NAME, one of your own aliases. A shipped alias that it hid is there again.

    \b
    Example:
      conmoe-edge models unalias mine
    """
    from conmoe_edge.checkpoint.sources.user_aliases import alias_file, remove_alias

    now = remove_alias(name)
    output.value({"name": name.strip().lower(), "target": now, "aliases_file": str(alias_file())})
    again = "" if now is None else f" It means {now} again."
    output.result(_said(f"{name.strip().lower()} is forgotten.{again}"))


def _said(text: str) -> str:
    from conmoe_edge.cli.ui.text import printable

    return printable(text)
