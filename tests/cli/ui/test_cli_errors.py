"""Every exception becomes at most three lines, or one JSON value, and the right status."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from conmoe_edge import errors
from conmoe_edge.cli.main import main
from conmoe_edge.cli.ui.error_text import Interrupted, describe


class Boom(Exception):
    pass


RAISED: dict[str, tuple[BaseException, int]] = {
    "does not fit": (
        errors.DoesNotFit("OLMoE does not fit in 2 GB.", "it needs 3", "--gpu 3GB"),
        3,
    ),
    "usage": (errors.UsageError("No profile x.", "", "profiles list"), 2),
    "missing": (errors.ModelNotFound("There is no model x."), 1),
    "unforeseen": (Boom("first line\nsecond line"), 1),
    "disk": (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "/x"), 1),
    "absent": (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 1),
    "memory": (MemoryError(), 1),
    "interrupt": (KeyboardInterrupt(), 130),
    "stopped": (Interrupted("Stopped after layer 7 of 16."), 130),
}


@pytest.fixture(params=list(RAISED))
def failing(request: pytest.FixtureRequest) -> Iterator[int]:
    """A command ``fail`` that raises; the value is the status to expect."""
    error, status = RAISED[request.param]

    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def fail(as_json: bool) -> None:
        raise error

    main.add_command(fail, "fail")
    yield status
    del main.commands["fail"]


def test_three_lines_and_no_traceback(failing: int) -> None:
    result = CliRunner().invoke(main, ["fail"])
    assert result.exit_code == failing
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 3
    assert "Traceback" not in result.stderr
    if failing != 130:
        assert lines[0].startswith("error: ")
        assert all(line.startswith(("  why:  ", "  fix:  ")) for line in lines[1:])


def test_json_has_one_value_on_stdout(failing: int) -> None:
    result = CliRunner().invoke(main, ["fail", "--json"])
    assert result.exit_code == failing
    value = json.loads(result.stdout)
    assert value["schema_version"] == 1
    assert set(value["error"]) == {"type", "what", "why", "fix"}
    assert value["error"]["what"]
    assert result.stderr.strip() == ""


def test_debug_shows_the_traceback(failing: int) -> None:
    result = CliRunner().invoke(main, ["--debug", "fail"])
    assert result.exit_code == failing
    assert "Traceback" in result.stderr


def test_the_variable_does_the_same(failing: int) -> None:
    result = CliRunner().invoke(main, ["fail"], env={"CONMOE_DEBUG": "1"})
    assert "Traceback" in result.stderr


def test_an_unforeseen_error_names_the_way_to_its_traceback() -> None:
    text = describe(Boom("first line\nsecond line"))
    assert "Boom" in text.what
    assert "first line" in text.what
    assert "second line" not in text.what
    assert "--debug" in text.fix


def test_out_of_memory_of_torch_is_known_by_name() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert describe(OutOfMemoryError("CUDA out of memory")).what == "Memory ran out."


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (["fitt"], "'fit'"),
        (["profiles", "shwo"], "'show'"),
        (["plan", "x", "--gup", "8GB"], "'--gpu'"),
    ],
)
def test_did_you_mean(arguments: list[str], suggested: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert f"Did you mean {suggested}?" in result.stderr


def test_a_usage_error_is_json_as_well() -> None:
    result = CliRunner().invoke(main, ["plan", "demo", "--json", "--rate", "2"])
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "UsageError"
    assert "--rate" in error["what"]
    assert error["fix"] == "conmoe-edge plan --help"


def test_text_from_outside_cannot_move_the_cursor() -> None:
    @click.command()
    def fail() -> None:
        raise errors.ModelNotFound("no \x1b[2J model\nerror: forged")

    main.add_command(fail, "fail")
    try:
        result = CliRunner().invoke(main, ["fail"])
    finally:
        del main.commands["fail"]
    assert "\x1b" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
