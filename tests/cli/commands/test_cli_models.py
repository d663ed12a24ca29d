"""``models``: names, the hub's cache, and what would fit, without a socket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from families import save_tiny
from huggingface_hub import constants

from conmoe_edge.checkpoint.sources.hub_cache import cached_models
from conmoe_edge.checkpoint.sources.locate import aliases
from conmoe_edge.cli.main import main

pytestmark = pytest.mark.disable_socket
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


def rows(*arguments: str) -> dict[str, dict]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["schema_version"] == 1
    return {row["name"]: row for row in value["models"]}


def snapshot(cache: Path, hub_id: str) -> Path:
    """An empty snapshot, laid out as the hub's own client does it."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole OLMoE under its alias' id, half of another, and a model without an alias."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    save_tiny("olmoe", snapshot(folder, "allenai/OLMoE-1B-7B-0924"))
    save_tiny("mixtral", snapshot(folder, "org/unnamed"))
    half = snapshot(folder, "Qwen/Qwen3-30B-A3B")
    (half / "config.json").write_text("{}", encoding="utf-8")
    (folder / "datasets--org--data").mkdir()
    return folder


def test_every_alias_and_what_is_here_of_it(cache: Path) -> None:
    found = rows()
    assert set(aliases()) < set(found)
    assert found["demo"]["here"] == "folder" and found["demo"]["bytes"] > 20_000_000
    assert found["olmoe"]["here"] == "cached"
    assert found["qwen3-30b"]["here"] == "partly"
    assert found["mixtral"]["here"] == "absent" and found["mixtral"]["bytes"] is None
    assert found["org/unnamed"] == {
        "name": "org/unnamed",
        "target": "org/unnamed",
        "own": False,
        "here": "cached",
        "bytes": found["org/unnamed"]["bytes"],
        "plan": None,
        "problem": None,
    }
    assert list(cached_models()) == [
        "Qwen/Qwen3-30B-A3B",
        "allenai/OLMoE-1B-7B-0924",
        "org/unnamed",
    ]
    text = run().stdout
    assert "comes along" in text and "23.2 MiB" in text and "partly" in text
    assert max(map(len, text.splitlines())) <= 80


def test_no_cache_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "absent"))
    assert cached_models() == {}
    assert rows()["olmoe"]["here"] == "absent"


def test_what_would_fit(cache: Path) -> None:
    found = rows("--gpu", "4GB")
    for name in ("demo", "olmoe", "org/unnamed"):
        plan = found[name]["plan"]
        assert plan["budget"]["asked"] == "4GB"
        assert plan["unchanged"] is True
    assert found["qwen3-30b"]["plan"] is None and found["mixtral"]["plan"] is None
    result = run("--gpu", "4GB")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["demo", "olmoe", "org/unnamed"]
    assert all("fits unchanged" in line for line in lines[1:])
    assert "not on this disk" in result.stderr and "--online" in result.stderr


def test_what_does_not_fit_is_said_and_the_others_are_planned(cache: Path) -> None:
    found = rows("--gpu", "540MB")
    assert found["demo"]["problem"]["type"] == "DoesNotFit"
    assert "--gpu" in found["demo"]["problem"]["fix"]
    assert run("--gpu", "540MB").exit_code == 0


@pytest.mark.parametrize("arguments", [("--gpu", "8"), ("--gpu", "rtx-4080"), ("--online",)])
def test_nonsense(cache: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_name_of_ones_own(cache: Path, tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "mine")
    result = run("alias", "Mine", str(folder))
    assert result.exit_code == 0 and result.stdout == f"mine now means {folder}.\n"
    row = rows()["mine"]
    assert (row["own"], row["here"], row["target"]) == (True, "folder", str(folder))
    assert "mine (yours)" in run().stdout
    assert json.loads(run("alias", "olmoe", "mine", "--json").stdout)["target"] == str(folder)
    plan = CliRunner().invoke(main, ["plan", "mine", "--gpu", "4GB", "--json", "--offline"])
    assert json.loads(plan.stdout)["model"]["experts"] == 24
    assert "It means allenai/OLMoE-1B-7B-0924 again." in run("unalias", "olmoe").stdout
    assert run("unalias", "mine").exit_code == 0
    assert "mine" not in rows()
    again = run("unalias", "mine")
    assert again.exit_code == 2 and "no alias 'mine'" in again.stderr


def test_an_alias_to_a_folder_that_is_gone(cache: Path, tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "mine")
    run("alias", "mine", str(folder))
    folder.rename(tmp_path / "moved")
    assert rows()["mine"]["here"] == "absent"
    assert "not there" in run().stdout
    assert rows("--gpu", "4GB")["mine"]["problem"]["type"] == "ModelNotFound"
