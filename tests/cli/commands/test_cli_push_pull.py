"""``conmoe-edge push`` and ``pull``, against a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hub_upload import WritableHub
from huggingface_hub import constants
from local_hub import local_hub

from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.cli.main import main


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in words])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    hub = WritableHub(token="hf_test")
    with local_hub(hub, tmp_path / "cache", monkeypatch) as serving:
        hub.endpoint = serving.endpoint
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.chdir(tmp_path)
        yield hub


def test_a_package_that_fit_wrote_goes_there_and_back_and_talks(
    package: Path, hub: WritableHub, tmp_path: Path
) -> None:
    sent = run("push", package, "org/tiny-900mb", "--json")
    assert sent.exit_code == 0, sent.stderr
    value = json.loads(sent.stdout)
    assert value["commit"] == hub.commit and value["public"] is False
    assert set(value["files"]) == {*load_manifest(package).files, "conmoe.json"}
    got = run("pull", "org/tiny-900mb", "--json")
    assert got.exit_code == 0, got.stderr
    assert json.loads(got.stdout)["bytes"] == value["bytes"]
    assert run("inspect", tmp_path / "tiny-900mb", "--verify").exit_code == 0
    words = ("--prompt", "Hello", "--max-tokens", "3")
    here, there = run("chat", package, *words), run("chat", tmp_path / "tiny-900mb", *words)
    assert there.exit_code == 0 and there.stdout == here.stdout
    again = run("pull", "org/tiny-900mb")
    assert again.exit_code == 1 and "--overwrite" in again.stderr


def test_a_dry_run_shows_the_card_as_it_is(package: Path, hub: WritableHub) -> None:
    shown = run("push", package, "org/tiny", "--dry-run")
    assert shown.exit_code == 0 and hub.asked == []
    card = json.loads(run("push", package, "org/tiny", "--dry-run", "--json").stdout)["card"]
    assert card in shown.stdout and "Would publish" in shown.stdout
    assert "| all | " in card and "conmoe-edge pull org/tiny\n" in card


def test_without_a_token_the_fix_is_a_command(
    package: Path, hub: WritableHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = run("push", package, "org/tiny")
    assert done.exit_code == 1 and "hf auth login" in done.stderr
