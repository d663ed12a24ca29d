"""An error is the same in words and in JSON; the value of ``--json`` stands alone in every case (that it does when a
command works: ``test_side_effects.py``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from every_command import FAILS, FROM_A_HUB, WORKS, commands, noise, value_of, words_of
from forked import FORK, Sandbox, command

pytestmark = pytest.mark.skipif(
    FORK is None, reason="the tests fork, so that torch is imported once"
)


@pytest.fixture
def places(model: Path, text: Path, package: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "model": model,
        "text": text,
        "package": package,
        "new": tmp_path / "new",
        "nowhere": tmp_path / "nowhere",
    }


def test_every_command_is_in_the_tables() -> None:
    assert set(commands()) == set(WORKS) | FROM_A_HUB == set(FAILS)


@pytest.mark.parametrize("name", commands())
def test_it_fails(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "box").made()
    words = words_of(name, FAILS, places)
    done = command(*words, "--json", sandbox=sandbox, first=noise)
    error = value_of(done)["error"]
    assert set(error) == {"type", "what", "why", "fix"} and error["what"]
    assert done.status in (1, 2, 3)
    assert "Traceback" not in done.stderr
    plain = command(*words, sandbox=sandbox)
    assert plain.status == done.status and plain.stdout == ""
    lines = plain.stderr.splitlines()
    said = [line for line in lines if line.startswith(("error: ", "  why:  ", "  fix:  "))]
    assert said == lines[-len(said) :] and said[0].startswith("error: ") and len(said) <= 3
    assert error["what"].splitlines()[0][:40] in said[0]


@pytest.mark.parametrize("name", ["inspect", "bench"])
def test_what_fails_after_the_value_is_said_beside_it(
    name: str, places: dict[str, Path], tmp_path: Path
) -> None:
    flag = {"inspect": "--html", "bench": "--svg"}[name]
    kept = tuple(word for word in WORKS[name] if word not in ("--html", "{new}"))
    words = (*words_of(name, {name: kept}, places), flag, str(tmp_path / "no" / "such" / "folder"))
    done = command(*words, "--json", sandbox=Sandbox(tmp_path / "box").made())
    assert done.status == 1
    assert "error" not in value_of(done)
    assert "error: " in done.stderr


def test_a_groups_word_holds_for_its_commands(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "box").made()
    done = command("models", "--json", "unalias", "nobody", sandbox=sandbox)
    assert value_of(done)["error"]["type"] == "UsageError"


def test_a_prompt_is_no_flag(package: Path, tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "box").made()
    done = command("chat", str(package), "--max-tokens", "2", "-p", "--json", sandbox=sandbox)
    assert done.status == 0 and not done.stdout.startswith("{")


def test_in_a_process_of_its_own_and_into_a_pipe(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "always",
            "-m",
            "conmoe_edge.cli.main",
            "profiles",
            "list",
            "--json",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert json.loads(done.stdout)["schema_version"] == 1
