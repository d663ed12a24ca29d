"""``profiles list`` and ``profiles show``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from conmoe_edge.cli.main import main
from conmoe_edge.memory.profiles import list_profiles


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config folder with one profile of the user's own."""
    monkeypatch.setenv("CONMOE_CONFIG_DIR", str(tmp_path))
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "mine.toml").write_text('base = "cpu-16gb"\ntitle = "my laptop"\n', encoding="utf-8")
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["profiles", *arguments])


def test_list_shows_every_profile_and_where_ones_own_go(own: Path) -> None:
    result = run("list")
    assert result.exit_code == 0
    for profile in list_profiles():
        assert profile.name in result.stdout
    assert str(own / "mine.toml") in result.stdout
    assert str(own) in result.stderr


def test_list_in_json() -> None:
    value = json.loads(run("list", "--json").stdout)
    assert value["schema_version"] == 1
    by_name = {profile["name"]: profile for profile in value["profiles"]}
    assert by_name["mine"]["title"] == "my laptop"
    assert (
        by_name["rtx-4090"]["usable"]
        == by_name["rtx-4090"]["memory"] - by_name["rtx-4090"]["reserve"]
    )


def test_show() -> None:
    result = run("show", "RTX-4090")
    assert result.exit_code == 0
    assert "1008 GB/s" in result.stdout
    value = json.loads(run("show", "rtx-4090", "--json").stdout)["profile"]
    assert value["memory"] == 24564 << 20


def test_an_unknown_one_names_the_nearest() -> None:
    result = run("show", "rtx-4080")
    assert result.exit_code == 2
    assert "rtx-4090" in result.stderr
    assert json.loads(run("show", "x", "--json").stdout)["error"]["type"] == "UsageError"
