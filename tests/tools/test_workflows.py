"""The workflows run what there is: targets of the Makefile, modules, and commands of the program."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterable, Mapping
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


WORKFLOW = {"name", "on", "permissions", "concurrency", "env", "jobs", "defaults", "run-name"}
JOB = {
    *("name", "permissions", "needs", "if", "runs-on", "environment", "concurrency", "outputs"),
    *("env", "defaults", "steps", "timeout-minutes", "strategy", "continue-on-error"),
    *("container", "services", "uses", "with", "secrets"),
}
STEP = {
    *("id", "if", "name", "uses", "run", "working-directory", "shell", "with", "env"),
    *("continue-on-error", "timeout-minutes"),
}
"""Keys, as GitHub's "Workflow syntax" has them; any other is refused there when the workflow starts."""
PINNED = re.compile(r"[\w-]+/[\w./-]+@v\d+")
CONTEXTS = ("github", "matrix", "runner", "env", "needs", "steps", "secrets", "inputs", "job")


def faults(workflow: Mapping[Any, Any]) -> list[str]:
    """What GitHub would refuse, or what would come to nothing there: keys that are none, jobs and values of the matrix
    that are not there, actions without a version.
    """
    found = _strange("workflow", {"on" if one is True else one for one in workflow}, WORKFLOW)
    for name, job in workflow["jobs"].items():
        found += _strange(name, job, JOB)
        needs = job.get("needs", [])
        for one in [needs] if isinstance(needs, str) else needs:
            found += [] if one in workflow["jobs"] else [f"{name}: needs {one}"]
        values = _values(job.get("strategy", {}).get("matrix", {}))
        for context, rest in re.findall(r"\$\{\{\s*(\w+)\.([\w.-]+)\s*\}\}", str(job)):
            if context not in CONTEXTS or (context == "matrix" and rest not in values):
                found.append(f"{name}: {context}.{rest}")
        for step in job["steps"]:
            found += _strange(name, step, STEP)
            if ("run" in step) == ("uses" in step):
                found.append(f"{name}: a step either runs something or uses an action")
            if "uses" in step and not PINNED.fullmatch(step["uses"]):
                found.append(f"{name}: {step['uses']}")
    return found


def _strange(place: str, keys: Iterable[str], known: set[str]) -> list[str]:
    return [f"{place}: {one}" for one in sorted(set(keys) - known)]


def _values(matrix: Mapping[str, Any]) -> set[str]:
    """Names of what a job is repeated for."""
    rows = matrix.get("include", [])
    return {*(matrix.keys() - {"include", "exclude"}), *(key for row in rows for key in row)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_github_would_refuse(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert faults(workflow) == []
    assert workflow["permissions"] == {"contents": "read"}


def test_one_version_of_every_action() -> None:
    used = {
        step["uses"]
        for path in FILES
        for job in jobs(path).values()
        for step in job["steps"]
        if "uses" in step
    }
    names = [one.partition("@")[0] for one in used]
    assert used and len(names) == len(set(names)), sorted(used)


GOOD = """
on: push
jobs:
  one:
    runs-on: ubuntu-latest
    strategy: {matrix: {os: [a, b], include: [{os: c, wheel: d}]}}
    steps:
      - uses: actions/checkout@v4
      - run: echo ${{ matrix.os }} ${{ matrix.wheel }} ${{ github.ref }}
  two:
    needs: one
    runs-on: ubuntu-latest
    steps: [{run: "true"}]
"""


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("checkout@v4", "checkout"),
        ("checkout@v4", "checkout@main"),
        ("needs: one", "needs: three"),
        ("needs: one", "need: one"),
        ("matrix.wheel", "matrix.weel"),
        ("github.ref", "git.ref"),
        ("jobs:", "perms: {}\njobs:"),
        ("- run: echo", "- runs: echo"),
        ("- uses: actions", "- run: x\n        uses: actions"),
    ],
)
def test_a_fault_is_found(good: str, bad: str) -> None:
    assert faults(yaml.safe_load(GOOD)) == []
    assert faults(yaml.safe_load(GOOD.replace(good, bad)))


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
