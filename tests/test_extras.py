"""The hint how to install an extra names packages that pip finds, not this one, which is on no index."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from conmoe_edge import extras

_PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


@pytest.mark.parametrize("extra", ["serve", "eval"])
def test_the_packages_of_the_project_file_are_named(extra: str) -> None:
    declared = tomllib.loads(_PROJECT.read_text())["project"]["optional-dependencies"][extra]
    said = extras.install_command(extra)
    assert said == "pip install " + " ".join(f"'{one}'" for one in declared)
    assert "conmoe-edge" not in said


def test_without_an_installation_it_is_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "DISTRIBUTION", "a-distribution-that-is-not-there")
    assert extras.install_command("serve") == "pip install '.[serve]' in the folder of conmoe-edge"


def test_no_hint_leads_to_an_index_that_does_not_have_it() -> None:
    for path in _PROJECT.parent.glob("conmoe_edge/**/*.py"):
        text = path.read_text(encoding="utf-8")
        assert "conmoe-edge[" not in text and "pip install conmoe-edge" not in text, path


def test_who_reads_it_elsewhere_gets_the_line_of_the_readme() -> None:
    """A model card is read on other machines, where nothing is installed yet."""
    command, _, place = extras.ELSEWHERE.partition("    # ")
    readme = (_PROJECT.parent / "README.md").read_text(encoding="utf-8")
    line = next(line for line in readme.splitlines() if line.strip().startswith(command + " "))
    assert "from a clone; Python 3.11 or newer" in line and "clone" in place and "3.11" in place
