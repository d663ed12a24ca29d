"""``conmoe-edge eval MODEL``: how good a package is, beside the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conmoe_edge.cli.ui.cli_options import (
    common_options,
    file_option,
    kv_precision_option,
    number_option,
    package_budget_option,
    run_device_option,
    tokens_option,
)
from conmoe_edge.errors import UsageError

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.compress.quality.metrics import Cost

_STREAMED = (
    "against",
    "text",
    "tokens",
    "sequence_length",
    "seed",
    "continuations",
    "continuation_tokens",
    "revision",
    "offline",
)
_TASKS = ("tasks_path", "limit", "fewshot", "gpu", "context")


@click.command("eval", short_help="Measure how good a package is, beside its source.")
@click.argument("model")
@click.option(
    "--against",
    metavar="SOURCE",
    help="Compare with this package or model; `none` for nothing.  [default: the model that the "
    "package was made from, if it is on this machine]",
)
@file_option(
    "--text",
    "Text to measure on, which no calibration should have seen; lines <|document domain=NAME|> "
    "divide it.  [default: a held-out text that comes along]",
)
@tokens_option("--tokens", "How much of the text.", default=8192)
@tokens_option("--sequence-length", "Tokens of one sequence.", default=512)
@number_option(
    "--seed",
    "Which parts of the text: 0 spreads them evenly, others draw them.",
    least=0,
    default=0,
)
@number_option(
    "--continuations",
    "Beginnings of the text that are continued greedily, to see repetition; 0 for none.",
    least=0,
    default=6,
)
@tokens_option(
    "--continuation-tokens",
    "Length of each continuation. Every token runs every layer.",
    default=48,
)
@click.option(
    "--tasks",
    metavar="TASK[,TASK]",
    help="Run these tasks of lm-eval on the package instead, inside its budget.",
)
@click.option(
    "--tasks-path",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Task files of your own, for --tasks.",
)
@number_option("--limit", "Examples of each task at most.", least=1)
@number_option(
    "--fewshot", "Examples before each question of a task.  [default: the task's]", least=0
)
@package_budget_option
@tokens_option("--context", "Context to load for, with --tasks.")
@kv_precision_option
@run_device_option
@click.option("--revision", metavar="R", help="Branch, tag or commit of a MODEL on the hub.")
@click.option("--offline", is_flag=True, help="Use only what is on this disk; open no socket.")
@common_options
@click.pass_context
def evaluate(
    ctx: click.Context, model: str, output: Output, tasks: str | None, **given: Any
) -> None:
    """Measure how good the package or model MODEL is on text.

    A package is compared with the model that it was made from, or with another package: loss,
    perplexity, divergence, how often both find the same token most likely, and how much greedy
    continuations repeat themselves. Both are streamed layer by layer, so neither has to fit in
    memory. docs/evaluate.md says what each number means.

    \b
    Examples:
      conmoe-edge eval ./out
      conmoe-edge eval ./out --text notes.txt --tokens 32k --continuations 0
      conmoe-edge eval ./out --against ./other-fit --json
      conmoe-edge eval demo
      conmoe-edge eval ./out --tasks arc_easy,hellaswag --limit 100
    """
    _one_of_both(ctx, tasks is not None)
    if tasks is not None:
        _tasks(model, tasks, given, output)
        return
    from conmoe_edge import api
    from conmoe_edge.cli.ui.progress import ProgressView
    from conmoe_edge.cli.views.evaluation_view import cost_lines, evaluation_view

    def tell_cost(cost: Cost) -> None:
        for line in cost_lines(cost):
            output.note(line)

    with ProgressView(output) as view:
        report = api.evaluate(
            model,
            **{name: given[name] for name in (*_STREAMED, "device", "kv_precision")},
            on_cost=tell_cost,
            progress=view.update,
        )
    output.value(report.to_json())
    output.note()
    output.result(evaluation_view(report))


def _one_of_both(ctx: click.Context, tasks: bool) -> None:
    """Flags of the one way do nothing in the other; better said than ignored."""
    from click.core import ParameterSource

    for name in _STREAMED if tasks else _TASKS:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} has no part in {'--tasks' if tasks else 'measuring on text'}.",
                "tasks run on a loaded package, and text is streamed through it",
                f"Leave {flag} out" if tasks else f"Add --tasks TASK, or leave {flag} out",
            )


def _tasks(folder: str, tasks: str, given: dict[str, Any], output: Output) -> None:
    from conmoe_edge.cli.commands.chat import check_package
    from conmoe_edge.cli.ui.text import path_text
    from conmoe_edge.cli.views.evaluation_view import tasks_view
    from conmoe_edge.integrations.harness import require_harness

    require_harness()
    check_package(Path(folder))
    from conmoe_edge import api

    output.note(f"Loading {path_text(folder)} ...")
    report = api.evaluate_tasks(
        folder,
        [name.strip() for name in tasks.split(",") if name.strip()],
        tasks_path=given["tasks_path"],
        limit=given["limit"],
        fewshot=given["fewshot"],
        budget=given["gpu"],
        device=None if given["device"] == "auto" else given["device"],
        context=given["context"],
        kv_precision=given["kv_precision"],
        bars=not output.quiet,
    )
    output.note()
    output.value(report.to_json())
    output.result(tasks_view(report))
