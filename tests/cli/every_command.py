"""Every command of the command line with words that work and words that do not, found by walking the commands: one that
is new and stands in no table here fails the tests that use it.
"""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from forked import Done

from conmoe_edge.cli.main import main

_RUNS = ("--gpu", "900MB", "--device", "cpu")

WORKS: dict[str, tuple[str, ...]] = {
    "run": (
        *("{model}", *_RUNS, "--prompt", "Hello", "--yes", "--rate", "50%", "--passes", "1"),
        *("--method", "frequency"),
    ),
    "list": (),
    "fit": (
        *("{model}", "--out", "{new}", *_RUNS, "--rate", "50%"),
        *("--calibration", "{text}", "--calibration-tokens", "256"),
    ),
    "chat": ("{package}", "--prompt", "Hello", "--max-tokens", "3"),
    "serve": ("{package}", "--port", "0"),
    "plan": ("{model}", *_RUNS),
    "bench": ("{package}", "--prompt-tokens", "8", "--tokens", "2", "--repeats", "1"),
    "eval": (
        *("{package}", "--text", "{text}", "--tokens", "128", "--sequence-length", "64"),
        *("--continuations", "1", "--continuation-tokens", "2"),
    ),
    "inspect": ("{package}", "--verify", "--html", "{new}"),
    "models": ("--gpu", "900MB"),
    "models alias": ("mine", "{model}"),
    "models unalias": ("mine",),
    "export": ("{package}", "{new}"),
    "push": ("{package}", "org/name", "--dry-run"),
    "profiles": (),
    "profiles list": (),
    "profiles show": ("cpu-16gb",),
    "doctor": (),
    "completion install": ("bash", "--rc"),
    "completion show": ("fish",),
}

FROM_A_HUB = frozenset({"pull", "rm"})
"""Commands that do nothing without a hub, or without what another command made; that they work:
``commands/test_cli_push_pull.py``, ``commands/test_cli_run.py``.
"""

FAILS: dict[str, tuple[str, ...]] = {
    "run": ("{nowhere}", "--prompt", "Hello"),
    "list": ("more",),
    "rm": ("nobody", "--yes"),
    "fit": ("{nowhere}", "--out", "{new}", *_RUNS),
    "chat": ("{nowhere}", "--prompt", "Hello"),
    "serve": ("{nowhere}", "--port", "0"),
    "plan": ("{model}", "--gpu", "1MB", "--device", "cpu"),
    "bench": ("{nowhere}",),
    "eval": ("{nowhere}",),
    "inspect": ("{model}",),
    "models": ("--gpu", "8"),
    "models alias": ("no/good", "{model}"),
    "models unalias": ("nobody",),
    "export": ("{nowhere}", "{new}"),
    "push": ("{nowhere}", "org/name"),
    "pull": ("no-name-on-the-hub",),
    "profiles": ("more",),
    "profiles list": ("more",),
    "profiles show": ("no-such-machine",),
    "doctor": ("--folder", "{text}"),
    "completion install": ("tcsh",),
    "completion show": ("tcsh",),
}


def commands() -> list[str]:
    """The names of all commands that do something by themselves: ``models alias``."""
    return list(_walk(main, click.Context(main), ""))


def _walk(group: click.Group, context: click.Context, before: str) -> Iterator[str]:
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None
        path = f"{before} {name}".strip()
        if isinstance(found, click.Group):
            if found.invoke_without_command:
                yield path
            yield from _walk(found, context, path)
        else:
            yield path


def words_of(
    command: str, table: dict[str, tuple[str, ...]], places: dict[str, Path]
) -> tuple[str, ...]:
    """The words of a command, with the places put in."""
    words = (word.format(**places) if word.startswith("{") else word for word in table[command])
    return (*command.split(), *words)


def noise() -> None:
    """What a library might say: through Python, below it, from a child process, and as a warning."""
    import conmoe_edge.cli.ui.output as output

    calm = output.calm_libraries

    def loud() -> None:
        calm()
        if click.get_current_context().invoked_subcommand is not None:
            return  # a group that only leads to its command
        warnings.simplefilter("always")
        warnings.warn("a warning of a library", stacklevel=1)
        print("a library says hello")
        os.write(1, b"a library in C says hello\n")
        subprocess.run(["echo", "a child says hello"], check=True)

    output.calm_libraries = loud


def value_of(done: Done) -> dict[str, Any]:
    """The one value; ``json.loads`` takes nothing beside it."""
    value = json.loads(done.stdout)
    assert isinstance(value, dict) and value["schema_version"] == 1
    assert done.stdout.isascii() and done.stdout.endswith("}\n")
    return value
