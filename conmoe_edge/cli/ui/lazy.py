"""A click group whose commands are imported when they are asked for, one file per command."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from conmoe_edge.errors import UsageError

ELSEWHERE = {
    "ls": "conmoe-edge list",
    "ps": "each serve runs the packages it was given; its page /health says what it holds",
    "show": "conmoe-edge inspect DIR",
    "delete": "conmoe-edge rm NAME",
    "remove": "conmoe-edge rm NAME",
    "download": "conmoe-edge pull NAME",
    "create": "conmoe-edge fit MODEL --out DIR",
    "quantize": "conmoe-edge fit MODEL --bits 4, or export DIR FILE --format gguf --quantise Q4_K_M",
    "quantise": "conmoe-edge fit MODEL --bits 4, or export DIR FILE --format gguf --quantise Q4_K_M",
    "convert": "conmoe-edge export DIR OUT",
    "generate": "conmoe-edge chat DIR --prompt TEXT",
    "benchmark": "conmoe-edge bench DIR",
    "evaluate": "conmoe-edge eval DIR",
    "stop": "Ctrl-C in the terminal where it runs",
    "start": "conmoe-edge serve DIR",
    "help": "conmoe-edge --help, or conmoe-edge COMMAND --help",
    "version": "conmoe-edge --version",
}
"""Commands that other programs have, and what does the same here."""


class SuggestingGroup(click.Group):
    """A group whose did-you-mean knows every command it lists, imported or not."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the names that ``list_commands`` has."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            if ctx.parent is None and error.command_name in ELSEWHERE:
                raise UsageError(
                    f"There is no command {error.command_name!r}.",
                    "",
                    ELSEWHERE[error.command_name],
                ) from None
            raise click.NoSuchCommand(
                error.command_name, possibilities=self.list_commands(ctx), ctx=ctx
            ) from None


class LazyGroup(SuggestingGroup):
    """``lazy`` maps a command's name to ``"package.module:attribute"``; the order of the mapping is
    that of the help.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name, in the order of the mapping."""
        return [*self._lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; ``None`` for a name that is not ours."""
        target = self._lazy.get(cmd_name)
        if target is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = target.partition(":")
        return getattr(import_module(module), attribute)
