"""``conmoe-edge bench DIR``: how fast a package runs inside its budget, and how far from the bound
of this machine that is.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conmoe_edge.cli.ui.cli_options import (
    Tokens,
    common_options,
    misses_option,
    package_budget_option,
    run_device_option,
)
from conmoe_edge.errors import UsageError

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.offload.generation.benchmark import Round


@click.command(short_help="Measure how fast a package runs, and against which bound.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@package_budget_option
@run_device_option
@misses_option
@click.option(
    "--context",
    metavar="N",
    type=Tokens(),
    help="Tokens of conversation to keep room for, 4096 or 32k.  [default: the plan's]",
)
@click.option(
    "--prompt-tokens",
    metavar="N",
    type=Tokens(),
    default=512,
    show_default=True,
    help="Length of the prompt.",
)
@click.option(
    "--tokens",
    metavar="N",
    type=Tokens(),
    default=64,
    show_default=True,
    help="Tokens that are generated, greedily.",
)
@click.option(
    "--repeats",
    metavar="N",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Rounds, each with another prompt.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Which prompts are taken from the text.",
)
@click.option(
    "--text",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Text to take the prompts from.  [default: a text that comes along]",
)
@click.option(
    "--svg",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the report into this file.",
)
@common_options
def bench(
    folder: Path,
    gpu: str | None,
    device: str,
    context: int | None,
    misses: str,
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
    from conmoe_edge.cli.commands.chat import check_package, open_session
    from conmoe_edge.cli.views.bench_facts import gather, measured_rates
    from conmoe_edge.cli.views.bench_report import make_report
    from conmoe_edge.cli.views.bench_table import bench_view

    check_package(folder)
    text = _text(run["text"])
    output.note("Measuring this machine ...")
    rates = measured_rates(folder)
    session = open_session(folder, gpu, device, context, output, misses=misses)
    prompts = _prompts(session.tokenizer, text, run, session.context)
    facts = gather(session, folder, rates, {**run, "text": _name(run["text"])})
    from conmoe_edge.offload.generation.benchmark import measure

    def tell(number: int, one: Round) -> None:
        speed = f"{one.decode.tokens_per_second:.1f} tokens/s"
        output.note(f"Round {number + 1} of {len(prompts)}: {speed}")

    report = make_report(facts, measure(session, prompts, run["tokens"], tell))
    output.note()
    output.value(report.to_json())
    output.result(bench_view(report))
    if svg is not None:
        from conmoe_edge.checkpoint.fs.atomic_files import write_bytes
        from conmoe_edge.cli.views.bench_svg import bench_svg

        write_bytes(svg, bench_svg(report).encode(), "--svg FILE in another folder")
        output.note(f"\nDrawn in {svg}.")


def _name(text: Path | None) -> str | None:
    return None if text is None else text.name


def _text(path: Path | None) -> str:
    """The user's text, or the one that was held out of every calibration."""
    if path is None:
        from conmoe_edge.compress.stream.calibration_text import bundled_text

        return "\n\n".join(document.text for document in bundled_text().held_out or ())
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"The text {path} cannot be read.", error.strerror or "", "--text FILE, or none at all"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The text {path} is not UTF-8 text.",
            f"byte {error.start} does not belong there",
            "save it as UTF-8, or leave --text out",
        ) from error


def _prompts(tokenizer: Any, text: str, run: dict[str, Any], context: int) -> list[list[int]]:
    """Windows of the text, drawn by the seed; the same again where there are fewer than rounds."""
    length, tokens = run["prompt_tokens"], run["tokens"]
    if length + tokens > context:
        less = context - tokens
        fix = f"--prompt-tokens {less}, or " if less > 0 else ""
        raise UsageError(
            f"{length} tokens of prompt and {tokens} after it do not fit.",
            f"the package keeps room for {context} tokens of conversation",
            f"{fix}--context {length + tokens} if the model goes that far",
        )
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = len(ids) // length
    if windows == 0:
        raise UsageError(
            f"The text has only {len(ids)} tokens, and a prompt is to have {length}.",
            "",
            f"a longer --text, or --prompt-tokens {len(ids)}"
            if ids
            else "--text FILE with text in it, or none at all",
        )
    drawn = random.Random(run["seed"]).sample(range(windows), min(run["repeats"], windows))
    chosen = [drawn[number % len(drawn)] for number in range(run["repeats"])]
    return [ids[one * length : (one + 1) * length] for one in chosen]
