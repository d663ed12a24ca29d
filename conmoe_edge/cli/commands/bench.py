"""``conmoe-edge bench DIR``: how fast a package runs inside its budget, and how far from the bound
of this machine that is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conmoe_edge.cli.ui.cli_options import (
    common_options,
    file_option,
    kv_precision_option,
    misses_option,
    number_option,
    package_budget_option,
    planned_context_option,
    run_device_option,
    tokens_option,
)

if TYPE_CHECKING:
    from conmoe_edge.api.benching import Stage
    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.offload.generation.benchmark import Round


@click.command(short_help="Measure how fast a package runs, and against which bound.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@package_budget_option
@run_device_option
@kv_precision_option
@misses_option
@planned_context_option
@tokens_option("--prompt-tokens", "Length of the prompt.", default=512)
@tokens_option("--tokens", "Tokens that are generated, greedily.", default=64)
@number_option("--repeats", "Rounds, each with another prompt.", least=1, default=3)
@number_option("--seed", "Which prompts are taken from the text.", least=0, default=0)
@file_option("--text", "Text to take the prompts from.  [default: a text that comes along]")
@file_option("--svg", "Draw the report into this file.")
@common_options
def bench(
    folder: Path,
    gpu: str | None,
    device: str,
    svg: Path | None,
    output: Output,
    **run: Any,
) -> None:
    """Measure how fast the package in DIR runs inside its budget.

    Prompts of real text go through, each followed by greedy tokens. The table says what was
    reached, what a token moved, how long the computing stood still for it, and how much of the
    bound that is: the bytes that have to move over the bandwidths of this machine, which are
    measured first.

    \b
    Examples:
      conmoe-edge bench ./out
      conmoe-edge bench ./out --gpu 4GB --tokens 128 --svg speed.svg
      conmoe-edge bench ./out --json > speed.json
    """
    from conmoe_edge import api
    from conmoe_edge.api.slow_line import slow_line
    from conmoe_edge.cli.commands.chat import check_package
    from conmoe_edge.cli.ui.text import path_text
    from conmoe_edge.cli.views.bench_table import bench_view
    from conmoe_edge.memory.garbage import settle

    check_package(folder)
    said = {"machine": "Measuring this machine ...", "load": f"Loading {path_text(folder)} ..."}

    def tell_stage(stage: Stage) -> None:
        if stage == "run":
            settle()
        else:
            output.note(said[stage])

    def tell(number: int, one: Round) -> None:
        speed = f"{one.decode.tokens_per_second:.1f} tokens/s"
        output.note(f"Round {number + 1} of {run['repeats']}: {speed}")

    report = api.bench(
        folder,
        budget=gpu,
        device=None if device == "auto" else device,
        on_stage=tell_stage,
        on_round=tell,
        **run,
    )
    if slow := slow_line(report.facts.budget.device):
        output.warning(slow)
    output.note()
    output.value(report.to_json())
    output.result(bench_view(report))
    if svg is not None:
        from conmoe_edge.checkpoint.fs.atomic_files import write_bytes
        from conmoe_edge.cli.views.bench_svg import bench_svg

        write_bytes(svg, bench_svg(report).encode(), "--svg FILE in another folder")
        output.note(f"\nDrawn in {svg}.")
