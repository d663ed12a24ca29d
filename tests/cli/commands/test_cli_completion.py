"""Completion: what is offered, and where the scripts go; bash itself asks where it is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from conmoe_edge.checkpoint.sources.locate import aliases, config_folder
from conmoe_edge.cli.main import main
from conmoe_edge.cli.ui.name_completion import METHODS
from conmoe_edge.memory.profiles import list_profiles

_ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["completion", *arguments])


def offered(*words: str, incomplete: str = "") -> list[str]:
    found = ShellComplete(main, {}, "conmoe-edge", "_X").get_completions(list(words), incomplete)
    return [one.value for one in found if one.type == "plain"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.setenv("SHELL", "/usr/bin/bash")
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_models_profiles_and_methods_are_offered() -> None:
    for command in ("fit", "plan"):
        assert offered(command) == sorted(aliases())
        assert offered(command, incomplete="qwen3-c") == ["qwen3-coder-30b"]
    profiles = [one.name for one in list_profiles()]
    assert offered("plan", "demo", "--gpu") == ["auto", *profiles]
    assert offered("chat", "out", "--gpu", incomplete="RTX-4090") == ["rtx-4090"]
    assert "8GB" in offered("bench", "out", "--gpu", incomplete="8")
    assert offered("profiles", "show") == profiles
    assert offered("fit", "demo", "--method") == list(METHODS)
    assert "inspect" in offered(incomplete="ins")


def test_the_methods_offered_are_those_there_are() -> None:
    from conmoe_edge.compress.methods import METHODS as THERE

    assert set(METHODS) == set(THERE)


def test_own_aliases_are_offered_and_a_damaged_file_is_no_trouble() -> None:
    CliRunner().invoke(main, ["models", "alias", "mine", "demo"])
    assert offered("models", "unalias") == ["mine"]
    assert "mine" in offered("fit")
    (config_folder() / "aliases.toml").write_text("[", encoding="utf-8")
    assert offered("models", "unalias") == [] == offered("fit")


@pytest.mark.parametrize(
    ("shell", "file", "rc"),
    [
        ("bash", ".local/share/bash-completion/completions/conmoe-edge", ".bashrc"),
        ("zsh", ".local/share/zsh/site-functions/_conmoe-edge", ".zshrc"),
        ("fish", ".config/fish/completions/conmoe-edge.fish", None),
    ],
)
def test_install_writes_one_file_and_rc_only_when_asked(
    shell: str, file: str, rc: str | None, home: Path
) -> None:
    if rc is not None:
        (home / rc).write_text("alias x=y", encoding="utf-8")
    result = run("install", shell)
    assert result.exit_code == 0, result.stderr
    assert (home / file).read_text() == run("show", shell).stdout
    assert "_CONMOE_EDGE_COMPLETE" in (home / file).read_text()
    if rc is None:
        assert json.loads(run("install", shell, "--rc", "--json").stdout)["rc"] is None
        return
    assert (home / rc).read_text() == "alias x=y"
    assert str(home / file).removesuffix("/_conmoe-edge") in result.stderr
    assert json.loads(run("install", shell, "--rc", "--json").stdout)["rc_changed"] is True
    once = (home / rc).read_text()
    assert once.startswith("alias x=y\n\n# completion of conmoe-edge\n")
    assert json.loads(run("install", shell, "--rc", "--json").stdout)["rc_changed"] is False
    assert (home / rc).read_text() == once


def test_the_shell_in_use_is_the_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/usr/local/bin/zsh")
    monkeypatch.setenv("ZDOTDIR", str(home / "zsh"))
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    value = json.loads(run("install", "--rc", "--json").stdout)
    assert value["shell"] == "zsh"
    assert Path(value["file"]) == home / "data" / "zsh" / "site-functions" / "_conmoe-edge"
    assert (home / "zsh" / ".zshrc").is_file()
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    result = run("install")
    assert result.exit_code == 2 and "tcsh" in result.stderr


def test_an_rc_file_that_is_a_link_stays_one(home: Path, tmp_path: Path) -> None:
    kept = tmp_path / "dotfiles" / "bashrc"
    kept.parent.mkdir()
    kept.write_text("x\n", encoding="utf-8")
    (home / ".bashrc").symlink_to(kept)
    run("install", "bash", "--rc")
    assert (home / ".bashrc").is_symlink() and "conmoe-edge" in kept.read_text()


def test_a_folder_that_cannot_be_written(home: Path) -> None:
    (home / ".local").write_text("a file", encoding="utf-8")
    result = run("install", "bash")
    assert result.exit_code == 1 and "completion show" in result.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_gets_the_names(home: Path) -> None:
    run("install", "bash")
    program = home / "bin" / "conmoe-edge"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m conmoe_edge.cli.main "$@"\n')
    program.chmod(0o755)
    asked = (
        "source ~/.local/share/bash-completion/completions/conmoe-edge\n"
        "COMP_WORDS=(conmoe-edge plan demo --gpu rtx-40); COMP_CWORD=4\n"
        '_conmoe_edge_completion conmoe-edge\necho "${COMPREPLY[@]}"\n'
    )
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        ["bash", "--norc", "-c", asked], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["rtx-4060-laptop-8gb", "rtx-4090"], done.stderr
