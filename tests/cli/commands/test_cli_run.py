"""``run``, ``list`` and ``rm``: a package in the user's data folder, from the first word to the last."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from families import save_tiny
from local_hub import put_into_cache
from small_tokenizers import make

from conmoe_edge.api.shelf import Kept, find_kept, kept, package_place, packages_folder
from conmoe_edge.cli.main import main
from conmoe_edge.errors import ModelNotFound, UsageError
from conmoe_edge.plan.request import PlanRequest


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("DATA", "CONFIG", "CACHE", "STATE"):
        monkeypatch.setenv(f"CONMOE_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = save_tiny("olmoe", tmp_path / "tiny", vocab_size=512)
    make("byte-bpe").save_pretrained(path)
    return path


def run(*arguments: str | Path, **options: Any) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], **options)


def test_from_a_model_to_an_answer_and_away_again(model: Path) -> None:
    ask = ("run", model, "--gpu", "2GiB", "--device", "cpu", "--prompt", "hello")
    refused = run(*ask)
    assert refused.exit_code == 2 and "--yes" in refused.stderr
    assert not packages_folder().exists()
    first = run(*ask, "--yes", "--json")
    assert first.exit_code == 0, first.stderr
    assert "reply" in json.loads(first.stdout) and "Fits unchanged" in first.stderr
    (one,) = kept()
    assert (one.kind, one.place.parent) == ("package", packages_folder())
    assert one.name.startswith("tiny-") and one.note == f"{model} for 2GiB"
    again = run(*ask)
    assert again.exit_code == 0 and "Fits unchanged" not in again.stderr
    by_name = run("run", one.name, "--prompt", "hello")
    assert by_name.exit_code == 0 and by_name.stdout == again.stdout
    listed = run("list")
    assert one.name in listed.stdout and "package" in listed.stdout
    kept_still = run("rm", one.name)
    assert kept_still.exit_code == 2 and one.place.is_dir()
    removed = run("rm", one.name, "--yes")
    assert removed.exit_code == 0 and not one.place.exists()
    assert json.loads(run("list", "--json").stdout)["kept"] == []
    assert (model / "config.json").is_file(), "the model itself is not ours to remove"


def test_a_package_anywhere_is_talked_to(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("fit", model, "--gpu", "2GiB", "--device", "cpu", "--out", out).exit_code == 0
    done = run("run", out, "--prompt", "hello")
    assert done.exit_code == 0 and not packages_folder().exists()


def test_another_question_is_another_package(model: Path) -> None:
    plain = package_place("demo", PlanRequest())
    assert plain == packages_folder() / "demo"
    others = [
        package_place("demo", PlanRequest(budget="8GB")),
        package_place("demo", PlanRequest(bits=3.0)),
        package_place(str(model), PlanRequest()),
    ]
    assert len({plain, *others}) == 4
    assert package_place("olmoe", PlanRequest()).name == "olmoe"
    assert package_place("org/name", PlanRequest()).name == "org-name"
    assert package_place("demo", PlanRequest(bits=3.0)) == others[1]


def test_only_what_was_made_here_is_removed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages_folder().mkdir(parents=True)
    (packages_folder() / "notes").mkdir()
    (packages_folder() / "link").symlink_to(model)
    partial = packages_folder() / ".demo.partial-abc"
    partial.mkdir()
    (partial / "x").write_bytes(b"1234")
    assert kept() == (Kept("demo", "unfinished", partial, 4),)
    with pytest.raises(UsageError, match="of yours"):
        find_kept(str(model))
    for name in ("notes", "link", "..", "no-such"):
        with pytest.raises((ModelNotFound, UsageError)):
            find_kept(name)
    assert run("rm", "demo", "--yes").exit_code == 0
    assert not partial.exists() and (packages_folder() / "notes").is_dir()


def test_a_model_in_the_cache_is_a_source(model: Path, tmp_path: Path) -> None:
    snapshot = put_into_cache(model, tmp_path / "hub", "0" * 40)
    (one,) = kept()
    assert (one.name, one.kind) == ("org/name", "source") and one.nbytes > 0
    assert run("rm", "org/name", "--yes").exit_code == 0
    assert kept() == () and not snapshot.exists()


def test_for_another_engine_it_is_fit(model: Path) -> None:
    done = run("run", model, "--for", "gguf", "--yes")
    assert done.exit_code == 2 and "--for gguf --out DIR" in done.stderr


@pytest.mark.parametrize("name", ["ls", "ps", "delete", "quantize", "help"])
def test_commands_of_other_programs_are_pointed_on(name: str) -> None:
    done = run(name)
    assert done.exit_code == 2
    assert f"There is no command '{name}'" in done.stderr and "fix:" in done.stderr


def test_the_first_step_is_said_until_there_is_a_package(model: Path) -> None:
    assert "To begin" in run().stdout
    run("run", model, "--yes", "--gpu", "2GiB", "--device", "cpu", "--prompt", "x")
    assert "To begin" not in run().stdout


@pytest.mark.parametrize("name", ["demo", "olmoe", "org/name"])
def test_a_model_is_no_package_and_chat_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("chat", name, "--prompt", "x")
    assert done.exit_code == 1 and f"conmoe-edge run {name}" in done.stderr
    elsewhere = run("chat", "./nowhere", "--prompt", "x")
    assert "fit MODEL --out nowhere" in elsewhere.stderr


def test_errors_of_the_fit_come_over_and_its_memory_stays_there(
    model: Path, tmp_path: Path
) -> None:
    """The fit has a process of its own; what it refuses is said as if it had not."""
    wish = ("run", model, "--gpu", "2GiB", "--device", "cpu", "--yes", "--prompt", "x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "packages").write_text("in the way")
    refused = run(*wish)
    assert (
        refused.exit_code == 1 and "error:" in refused.stderr and "Traceback" not in refused.stderr
    )
    (tmp_path / "data" / "packages").unlink()
    modules = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; from conmoe_edge.cli.main import main\n"
            "try: main(sys.argv[1:])\n"
            "finally: print('conmoe_edge.compress.pipeline' in sys.modules, file=sys.stderr)",
            *map(str, wish),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert modules.stdout.strip() and modules.stderr.splitlines()[-1] == "False"
