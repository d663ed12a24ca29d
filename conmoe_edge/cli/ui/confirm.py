"""A question that is answered with yes or no, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output


def confirmed(question: str, output: Output, *, default: bool = False) -> bool:
    """The answer; Ctrl-C and the end of the input are no."""
    try:
        return click.confirm(question, default, err=True)
    except click.Abort:
        output.note()  # closes the line of the question
        return False
