"""``--help`` and ``--version`` answer at once, because they import nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import conmoe_edge
from conmoe_edge.cli.main import main

_ROOT = Path(__file__).resolve().parents[2]
_HEAVY = ("torch", "transformers", "numpy", "safetensors", "accelerate", "bitsandbytes", "pydantic")
_PROBE = """
import json, os, sys
from conmoe_edge.cli.main import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as leaving:
    status = leaving.code
times = os.times()
print(json.dumps([status, times.user + times.system, sorted(sys.modules)]), file=sys.stderr)
"""


def start(*arguments: str) -> tuple[int, float, set[str], str]:
    """Status, seconds of processor time, loaded modules, stdout of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps(arguments)],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        check=True,
    )
    status, seconds, modules = json.loads(done.stderr.splitlines()[-1])
    return status, seconds, set(modules), done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("fit", "--help"),
        ("chat", "-h"),
        ("serve", "-h"),
        ("plan", "--help"),
        ("inspect", "--help"),
        ("models", "--help"),
        ("profiles", "--help"),
        ("completion", "--help"),
        ("doctor", "--help"),
    ],
)
def test_help_is_light_and_quick(arguments: tuple[str, ...]) -> None:
    status, seconds, modules, text = start(*arguments)
    assert status == 0
    assert text
    assert not modules & set(_HEAVY)
    # Processor time, the best of three: a busy machine must not fail this.
    if seconds >= 0.4:
        seconds = min(start(*arguments)[1] for _ in range(3))
    assert seconds < 0.4


def test_profiles_need_no_torch() -> None:
    status, _, modules, text = start("profiles", "list")
    assert status == 0
    assert "rtx-4090" in text
    assert "torch" not in modules


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.output == f"conmoe-edge {conmoe_edge.__version__}\n"


@pytest.mark.parametrize("name", ["fit", "chat", "plan", "profiles", "doctor"])
def test_every_help_has_examples_and_a_line_in_the_list(name: str) -> None:
    command = CliRunner().invoke(main, [name, "--help"])
    assert "Examples:" in command.output
    assert f"conmoe-edge {name}" in command.output.split("Examples:")[1]
    overview = CliRunner().invoke(main, ["--help"]).output
    line = next(x for x in overview.splitlines() if x.strip().startswith(f"{name} "))
    assert line.rstrip().endswith(".")


def test_every_flag_says_what_it_does() -> None:
    import click

    def walk(command: click.Command, context: click.Context) -> None:
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{command.name} {option.opts}"
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                assert child is not None
                walk(child, context)

    walk(main, click.Context(main))


def test_the_reference_is_that_of_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "tools/cli_reference.py", "--check"],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )
    assert done.returncode == 0, done.stderr


def groups() -> list[tuple[str, ...]]:
    """The words of every group of commands."""
    context = click.Context(main)
    inner = [
        (name,)
        for name in main.list_commands(context)
        if isinstance(main.get_command(context, name), click.Group)
    ]
    return [(), *inner]


@pytest.mark.parametrize("words", groups(), ids=" ".join)
def test_a_group_alone_answers_on_stdout(words: tuple[str, ...], tmp_path: Path) -> None:
    """With its help or its list, never as an error, never with what stands for a newline in one."""
    done = CliRunner().invoke(main, [*words], env={"CONMOE_CONFIG_DIR": str(tmp_path)})
    assert done.exit_code == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5 and "error:" not in done.stderr
    assert "?  " not in done.stdout


def test_the_profiles_alone_are_a_list_in_json_as_well(tmp_path: Path) -> None:
    env = {"CONMOE_CONFIG_DIR": str(tmp_path)}
    alone = CliRunner().invoke(main, ["profiles", "--json"], env=env)
    assert alone.stdout == CliRunner().invoke(main, ["profiles", "list", "--json"], env=env).stdout
    assert json.loads(alone.stdout)["profiles"]


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "conmoe_edge", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )
    assert done.stdout == f"conmoe-edge {conmoe_edge.__version__}\n"
