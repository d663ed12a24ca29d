"""Folders with odd names, and folders where an output should not go: they work, or one clear error says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from conmoe_edge.cli.main import main


def fit(model: Path, out: Path | str) -> Result:
    """The model fits as it is, so this is quick."""
    words = ["--gpu", "900MB", "--device", "cpu", "--offline"]
    return CliRunner().invoke(main, ["fit", str(model), f"--out={out}", *words])


@pytest.mark.parametrize(
    "name",
    [
        "two words",
        "größe-模型-🦀",
        "new\nline",
        "-dash",
        "--out",
        "quote'\"$(id)`",
        "[bold]name[bold]",
        "dot.",
        "x" * 200,
        "%s{0}",
        ".hidden",
        "a\x1b[2Jb",
    ],
)
def test_names(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = fit(model, name)
    assert done.exit_code == 0, done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {name}
    seen = CliRunner().invoke(main, ["inspect", "--json", "--", name])
    assert json.loads(seen.stdout)["package"]["path"] == name
    asked = CliRunner().invoke(main, ["chat", "-p", "Hello", "--max-tokens", "1", "--", name])
    assert asked.exit_code == 0, asked.stderr


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 2500 + "y"])
def test_names_that_no_folder_can_have(name: str, model: Path, tmp_path: Path) -> None:
    done = fit(model, f"{tmp_path}/{name}")
    assert done.exit_code in (1, 2)
    assert done.stderr.splitlines()[-1].startswith("  fix:  ") and "Traceback" not in done.stderr
    assert "--debug" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_models_own_folder_is_kept(model: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in model.iterdir()}
    for more in ((), ("--overwrite",)):
        words = ["fit", str(model), "--out", str(model), "--gpu", "900MB", "--device", "cpu", *more]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 1 and "  fix:  " in done.stderr
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_a_package_inside_the_models_folder(model: Path, tmp_path: Path) -> None:
    import shutil

    mine = shutil.copytree(model, tmp_path / "mine")
    assert fit(mine, mine / "out").exit_code == 0
    assert (mine / "out" / "conmoe.json").is_file()
    assert {path.name for path in mine.iterdir()} == {
        *(path.name for path in model.iterdir()),
        "out",
    }


def test_a_link_leads_to_where_the_package_is_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    assert fit(model, tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real" / "conmoe.json").is_file()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    done = fit(model, tmp_path / "loop")
    assert done.exit_code in (1, 2) and "  fix:  " in done.stderr
