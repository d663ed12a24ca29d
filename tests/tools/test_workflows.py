"""The workflows run what there is: targets of the Makefile, modules, and commands of the program."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from conmoe_edge.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def lines(job: dict[str, Any]) -> list[str]:
    """Lines of the shell."""
    return [line for step in job["steps"] for line in step.get("run", "").splitlines() if line]


def unknown(line: str) -> str:
    """What of a line of the shell is not there; empty for nothing."""
    words = shlex.split(line)
    if words[0] == "make":
        missing = [one for one in words[1:] if "=" not in one and one not in TARGETS]
        return ", ".join(missing)
    if words[:2] != ["python", "-m"]:
        return ""
    module = words[2]
    if module == "conmoe_edge":
        command = main.get_command(main.make_context("x", [], resilient_parsing=True), words[3])
        if command is None:
            return words[3]
        flags = {flag for one in command.params for flag in one.opts}
        return ", ".join(one for one in words[4:] if one.startswith("--") and one not in flags)
    ours = module in ("pytest", "pip", "zipfile")
    return "" if not ours or importlib.util.find_spec(module) else module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_line_runs_something_that_is_there(path: Path) -> None:
    for name, job in jobs(path).items():
        assert job["runs-on"] and job["timeout-minutes"], name
        for line in lines(job):
            assert unknown(line) == "", (name, line)


def test_what_is_not_there_is_found() -> None:
    assert unknown("make nothing-here") and unknown("python -m conmoe_edge fitt demo")
    assert unknown("python -m conmoe_edge fit demo --rat 25%") == "--rat"
    assert not unknown('make quality TORCH="torch --index-url x"')


def test_the_three_systems_run_the_tests() -> None:
    found = jobs(ROOT / ".github" / "workflows" / "ci.yml")
    assert found["test"]["strategy"]["matrix"]["os"] == [
        *("ubuntu-latest", "windows-latest", "macos-latest")
    ]
    assert any("pytest" in line for line in lines(found["test"]))
