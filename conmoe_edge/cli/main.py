"""The entry point: the group, its global flags, and the one place where an exception becomes text
and an exit status.

Exit status: 0 done, 1 failure, 2 usage, 3 does not fit, 130 interrupted. An error is three lines on
stderr, or one JSON value on stdout where ``--json`` was given; a traceback only with ``--debug`` or
``CONMOE_DEBUG=1``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click
from click.exceptions import NoArgsIsHelpError

from conmoe_edge.cli.ui.cli_options import Settings, debug_wanted
from conmoe_edge.cli.ui.error_text import describe
from conmoe_edge.cli.ui.json_stdout import one_run
from conmoe_edge.cli.ui.lazy import LazyGroup

_COMMANDS = {
    "run": "conmoe_edge.cli.commands.run:run",
    "fit": "conmoe_edge.cli.commands.fit:fit",
    "chat": "conmoe_edge.cli.commands.chat:chat",
    "serve": "conmoe_edge.cli.commands.serve:serve",
    "plan": "conmoe_edge.cli.commands.plan:plan",
    "bench": "conmoe_edge.cli.commands.bench:bench",
    "eval": "conmoe_edge.cli.commands.evaluate:evaluate",
    "inspect": "conmoe_edge.cli.commands.inspect:inspect",
    "list": "conmoe_edge.cli.commands.list_kept:list_kept",
    "rm": "conmoe_edge.cli.commands.remove:remove",
    "models": "conmoe_edge.cli.commands.models:models",
    "export": "conmoe_edge.cli.commands.export:export",
    "push": "conmoe_edge.cli.commands.push:push",
    "pull": "conmoe_edge.cli.commands.pull:pull",
    "profiles": "conmoe_edge.cli.commands.profiles:profiles",
    "doctor": "conmoe_edge.cli.commands.doctor:doctor",
    "completion": "conmoe_edge.cli.commands.completion:completion",
}


class Application(LazyGroup):
    """The group with our own last resort: same text and status from a shell, a test and ``python
    -m``.
    """

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run and leave with the status; with ``standalone_mode=False`` return and raise as click
        does.
        """
        words = list(sys.argv[1:] if args is None else args)
        name = prog_name or "conmoe-edge"
        if not standalone_mode:
            return super().main(words, name, complete_var, standalone_mode=False, **extra)
        with one_run():
            try:
                status = super().main(words, name, complete_var, standalone_mode=False, **extra)
            except NoArgsIsHelpError as bare:  # a group alone: its help is the answer, no error
                click.echo(bare.format_message())
                if not words:
                    _first_step()
                status = 0
            except (Exception, KeyboardInterrupt) as error:
                _fail(error, words)
        sys.exit(status if isinstance(status, int) else 0)


def _first_step() -> None:
    """What to do first, where nothing has been done yet."""
    from conmoe_edge.api.shelf import kept
    from conmoe_edge.errors import ConmoeError

    try:
        nothing = not any(one.kind == "package" for one in kept())
    except ConmoeError:
        return  # of the disk; doctor says it
    if nothing:
        click.echo("\nNothing is here yet. To begin, in a minute or two: conmoe-edge run demo")


def _fail(error: BaseException, words: Sequence[str]) -> NoReturn:
    """Show the error in the mode that the words of the command line ask for, and leave.

    The words are read here once more because an error of usage comes before click has parsed them.
    """
    from conmoe_edge.cli.ui.output import Output

    text = describe(error)
    output = Output(as_json="--json" in words)
    if debug_wanted("--debug" in words) and not isinstance(error, click.ClickException):
        import traceback

        output.error_stream_write("".join(traceback.format_exception(error)))
    output.error(text)
    sys.exit(text.exit_code)


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from conmoe_edge import __version__

        click.echo(f"conmoe-edge {__version__}")
        ctx.exit()


@click.group(
    name="conmoe-edge",
    cls=Application,
    lazy=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks; CONMOE_DEBUG=1 does the same.")
@click.option("--quiet", "-q", is_flag=True, help="Nothing on stderr but warnings and errors.")
@click.pass_context
def main(ctx: click.Context, debug: bool, quiet: bool) -> None:
    """Fit a Mixture-of-Experts language model into the memory you have, and run it.

    \b
    Start here (the model `demo` comes with the program, nothing is downloaded):
      conmoe-edge run demo                            fit it into this machine, and talk to it
      conmoe-edge fit demo --gpu 562MB --device cpu   measure, plan, consolidate, write ./out
      conmoe-edge chat ./out                          talk to it inside that budget

    \b
    A bigger one:
      conmoe-edge plan olmoe --gpu 8GB                what would be done, before any download
      conmoe-edge fit olmoe --gpu 8GB --out ./olmoe-8gb

    Results go to stdout, everything else to stderr. Every command takes --json. Exit status: 0
    done, 1 failure, 2 usage, 3 does not fit, 130 interrupted.

    Completion by the tab key: conmoe-edge completion install
    """
    ctx.obj = Settings(debug=debug_wanted(debug), quiet=quiet)


if __name__ == "__main__":
    main()
