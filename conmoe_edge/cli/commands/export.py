"""``conmoe-edge export DIR OUT``: a package as a plain checkpoint, or as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from conmoe_edge.cli.ui.cli_options import common_options, file_option
from conmoe_edge.cli.ui.text import path_text
from conmoe_edge.plan.gguf_types import FILE_TYPES

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output


@click.command(short_help="Write a package as a plain checkpoint, or as GGUF.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(("hf", "gguf")),
    default="hf",
    show_default=True,
    help="hf: a folder for transformers, vLLM and SGLang; gguf: a file for llama.cpp, Ollama and LM Studio.",
)
@click.option(
    "--outtype",
    type=click.Choice(("auto", "f32", "f16", "bf16")),
    default="auto",
    show_default=True,
    help="Number format of the matrices in a GGUF file; auto is the model's own.",
)
@click.option(
    "--quantise",
    metavar="TYPE",
    type=click.Choice(tuple(FILE_TYPES), case_sensitive=False),
    help="Quantise a GGUF file with llama.cpp's own library: Q4_K_M, Q5_K_M, Q8_0, IQ4_NL, MXFP4_MOE, ...",
)
@click.option(
    "--imatrix/--no-imatrix",
    default=True,
    show_default=True,
    help="Weigh columns by what enters them, measured on calibration text.",
)
@file_option("--calibration", "Text for the importance matrix.  [default: one that comes along]")
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=64),
    default=16384,
    show_default=True,
    help="Tokens for the importance matrix.",
)
@file_option("--llama-python", "Python that has llama-cpp-python.  [default: this one]")
@click.option(
    "--pre-tokenizer",
    metavar="NAME",
    help="llama.cpp's name of how the tokenizer cuts texts.  [default: found out, or refused]",
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier export wrote.")
@common_options
def export(
    folder: Path,
    out: Path,
    form: str,
    outtype: str,
    quantise: str | None,
    imatrix: bool,
    calibration: Path | None,
    calibration_tokens: int,
    llama_python: Path | None,
    pre_tokenizer: str | None,
    overwrite: bool,
    output: Output,
) -> None:
    """Write the package DIR as OUT, for engines that have one expert for every router slot.

    Packages that were fitted with --for hf or --for gguf become a smaller checkpoint, and so do
    those that only prune, with as many experts left in every layer. Others become one of the model's own
    size, in which each router slot has a copy of its prototype: the same answers, no memory saved.
    Where router slots add constants, as `fit` makes them unless it is told otherwise, the package
    is refused: `plan` says so beforehand. vLLM runs a package as it is, without an export
    (docs/cluster.md).

    \b
    Examples:
      conmoe-edge export ./out ./out-hf
      conmoe-edge export ./out ./out.gguf --format gguf
      conmoe-edge export ./out ./out-q4.gguf --format gguf --quantise Q4_K_M
      conmoe-edge export ./out ./out-hf --overwrite --json
    """
    from conmoe_edge import api
    from conmoe_edge.cli.ui.progress import ProgressView
    from conmoe_edge.units import human_size

    view = ProgressView(output)
    with view:
        done = api.export(
            folder,
            out,
            form=form,
            outtype=outtype,
            quantise=quantise,
            imatrix=imatrix,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            llama_python=llama_python,
            pre_tokenizer=pre_tokenizer,
            overwrite=overwrite,
            progress=view.update,
        )
    output.value(
        {
            "out": str(done.folder),
            "format": form,
            "kind": done.kind,
            "experts": done.experts,
            "width": done.width,
            "bytes_written": done.nbytes,
            "notes": list(done.notes),
        }
    )
    for note in done.notes:
        output.result(note)
    output.result(f"Wrote {path_text(done.folder)} ({human_size(done.nbytes)}).")
