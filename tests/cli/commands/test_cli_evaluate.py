"""``eval`` on the command line, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from families import save_tiny, save_tokenizer

from conmoe_edge.cli.main import main
from conmoe_edge.cli.views.evaluation_view import cost_lines
from conmoe_edge.compress.quality.metrics import Cost

_SMALL = ("--tokens", "128", "--sequence-length", "32", "--continuation-tokens", "4")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The lighthouse stood on a rock in the sea. " * 100, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def package(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model = save_tiny("qwen3_moe", folder / "tiny")
    save_tokenizer(model)
    out = folder / "out"
    levers = ("--gpu", "2GiB", "--device", "cpu", "--rate", "50%", "--precision", "source")
    calibration = ("--calibration", str(text), "--calibration-tokens", "512", "--seed", "3")
    done = run("fit", str(model), "--out", str(out), *levers, *calibration, "--offline", "-q")
    assert done.exit_code == 0, done.stderr
    return out


def evaluated(package: Path, text: Path, *more: str) -> Result:
    return run("eval", str(package), "--text", str(text), "--offline", *_SMALL, *more)


def test_the_table_names_both_and_says_what_it_took(package: Path, text: Path) -> None:
    result = evaluated(package, text)
    assert result.exit_code == 0, result.stderr
    assert "50 % of the experts removed" in result.stdout
    assert "Against" in result.stdout and "same top-1" in result.stdout
    assert "4-grams repeat" in result.stdout
    assert "128 tokens through each of two models" in result.stderr
    assert "held in memory" in result.stderr


def test_json_has_the_figures_of_the_table(package: Path, text: Path) -> None:
    value = json.loads(evaluated(package, text, "--json").stdout)
    assert value["schema_version"] == 1
    assert value["reference"]["origin"] is True
    loss = value["quality"]["loss"]
    assert f"{loss:.4f}" in evaluated(package, text, "-q").stdout


def test_without_continuations_and_without_a_reference(package: Path, text: Path) -> None:
    result = evaluated(package, text, "--continuations", "0", "--against", "none")
    assert result.exit_code == 0, result.stderr
    assert "4-grams" not in result.stdout and "continuation" not in result.stderr
    assert "Compared with nothing: as asked." in result.stdout


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--tasks", "arc_easy", "--seed", "1"), "--seed"),
        (("--limit", "5"), "--limit"),
        (("--gpu", "8GB"), "--gpu"),
    ],
)
def test_flags_of_the_other_way_are_refused(
    package: Path, flags: tuple[str, ...], named: str
) -> None:
    result = run("eval", str(package), *flags)
    assert result.exit_code == 2
    assert f"{named} has no part in" in result.stderr


def test_tasks_want_a_package(tmp_path: Path) -> None:
    result = run("eval", str(tmp_path / "no"), "--tasks", "arc_easy")
    assert result.exit_code == 1 and "There is no folder" in result.stderr


def test_what_does_not_fit_in_memory_is_told_with_its_bytes() -> None:
    cost = Cost(1000, 2, 6, 48, held=(True, False), memory_bytes=(1 << 30, 4 << 30))
    lines = list(cost_lines(cost))
    assert cost.repeated_bytes == 48 * (4 << 30)
    assert "192.00 GiB are loaded" in lines[1] and "--continuations 0" in lines[1]
