"""``conmoe-edge completion``: names and flags by the tab key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from conmoe_edge.cli.ui.cli_options import common_options
from conmoe_edge.cli.ui.lazy import SuggestingGroup

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output

_SHELL = click.Choice(("bash", "zsh", "fish"))


@click.group(cls=SuggestingGroup, short_help="Complete commands and names in your shell.")
def completion() -> None:
    """Complete commands, flags, models, profiles and methods by the tab key.

    \b
    Examples:
      conmoe-edge completion install
      conmoe-edge completion install zsh --rc
      conmoe-edge completion show bash > /etc/bash_completion.d/conmoe-edge
    """


@completion.command(short_help="Put the script where your shell looks for it.")
@click.argument("shell", type=_SHELL, required=False)
@click.option("--rc", is_flag=True, help="Also add the needed lines to .bashrc or .zshrc, once.")
@common_options
def install(shell: str | None, rc: bool, output: Output) -> None:
    """Install completion for SHELL, by default the one that you use.

    Writes one file of its own. What has to stand in .bashrc or .zshrc is said; with --rc it is
    added there.

    \b
    Examples:
      conmoe-edge completion install
      conmoe-edge completion install bash --rc
    """
    from conmoe_edge.cli.ui import shells as _shells
    from conmoe_edge.cli.ui.text import path_text

    where = _shells.place(shell or _shells.current_shell())
    _shells.install(where, _shells.script(where.shell, _root()))
    changed = _shells.add_to_rc(where) if rc and where.lines else False
    output.value(
        {
            "shell": where.shell,
            "file": str(where.file),
            "rc": str(where.rc) if where.lines else None,
            "rc_lines": where.lines,
            "rc_changed": changed,
        }
    )
    output.result(f"Written: {path_text(where.file)}")
    if changed:
        output.result(f"Added to {path_text(where.rc)}.")
    elif rc and where.lines:
        output.result(f"{path_text(where.rc)} had the lines already.")
    elif where.lines:
        if where.shell == "bash":
            output.note("With the package bash-completion that is all. Without it,")
        output.note(f"add to {path_text(where.rc)}, or let --rc do it:\n")
        output.note("\n".join(f"  {line}" for line in where.lines.splitlines()) + "\n")
    output.note("Then open a new shell.")


@completion.command(short_help="Print the script.")
@click.argument("shell", type=_SHELL, required=False)
@common_options
def show(shell: str | None, output: Output) -> None:
    """Print the completion script of SHELL, by default of the one that you use.

    \b
    Examples:
      conmoe-edge completion show fish
      eval "$(conmoe-edge completion show bash)"
    """
    from conmoe_edge.cli.ui import shells as _shells

    chosen = shell or _shells.current_shell()
    text = _shells.script(chosen, _root())
    output.value({"shell": chosen, "script": text})
    if not output.as_json:
        output.stream(text)


def _root() -> click.Command:
    return click.get_current_context().find_root().command
