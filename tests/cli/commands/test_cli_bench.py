"""``bench`` on real packages of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from families import save_tiny, save_tokenizer, tiny_model
from hand_packages import thirds, write_package

from conmoe_edge.api import bench_facts
from conmoe_edge.api.bench_facts import Rates
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.cli.main import main

_RUN = ("--device", "cpu", "--gpu", "2GB", "--prompt-tokens", "40", "--tokens", "6")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ("bench", *arguments))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third of the experts of a tiny OLMoE, each router slot sharing one with its neighbours."""
    folder = tmp_path_factory.mktemp("bench") / "package"
    model = tiny_model("olmoe")
    write_package(model, folder, thirds(model))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("abcdefgh" * 60, encoding="utf-8")
    return path


def test_the_json_has_the_figures_and_they_agree(package: Path, text: Path) -> None:
    result = run(str(package), *_RUN, "--text", str(text), "--repeats", "2", "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["schema_version"] == 1
    assert list(value) == [
        "schema_version",
        "package",
        "settings",
        "runtime",
        "machine",
        "decode",
        "prefill",
        "memory",
        "expected",
        "rounds",
    ]
    assert value["settings"]["prompt_tokens"] == 40 and value["settings"]["text"] == "text.txt"
    assert len(value["rounds"]) == 2
    decode = value["decode"]
    for one in value["rounds"]:
        assert (one["prefill"]["tokens"], one["decode"]["tokens"]) == (40, 6)
        # Of 8 slots, 3 of which are asked for, 3 + 3 + 2 share a prototype: 1 to 3 a layer.
        assert 6 * 3 * 1 <= one["decode"]["hits"] <= 6 * 3 * 3
    assert decode["hit_rate"] == 1.0 and decode["bytes_per_token"]["disk"] == 0
    low, median, high = (decode["tokens_per_second"][key] for key in ("low", "median", "high"))
    assert 0 < low <= median <= high
    bound = decode["bound"]
    assert bound["share_of_serial"] == pytest.approx(median / bound["serial_tokens_per_second"])
    read = value["machine"]["memory_bandwidth"] * bound["device_seconds_per_token"]
    assert read == pytest.approx(decode["bytes_per_token"]["memory"])
    expected = value["expected"]
    assert expected["measured_ratio"] == pytest.approx(median / expected["tokens_per_second"])
    assert value["prefill"]["first_token_seconds"]["median"] > 0


def test_the_table_and_the_picture(package: Path, text: Path, tmp_path: Path) -> None:
    picture = tmp_path / "speed.svg"
    options = ("--text", str(text), "--repeats", "1", "--svg", str(picture))
    result = run(str(package), *_RUN, *options)
    assert result.exit_code == 0, result.stderr
    for words in ("tokens/s", "share of that bound", "first token", "hit rate", "Expected"):
        assert words in result.stdout
    assert "Round 1 of 1" in result.stderr and "Round" not in result.stdout
    assert ElementTree.fromstring(picture.read_text(encoding="utf-8")).tag.endswith("svg")


@pytest.mark.parametrize(
    ("options", "status", "what", "fix"),
    [
        (("--gpu", "100MB", "--device", "cpu"), 3, "holds no prototype", "--gpu "),
        ((*_RUN, "--prompt-tokens", "4000"), 2, "4000 tokens of prompt", "--context 4006"),
        ((*_RUN, "--prompt-tokens", "125"), 2, "125 tokens of prompt", "--prompt-tokens 122"),
        ((*_RUN, "--text", "{short}"), 2, "The text has only 4 tokens", "--prompt-tokens 4"),
        ((*_RUN, "--text", "{folder}/nothing"), 2, "cannot be read", "--text FILE"),
        (
            (*_RUN, "--repeats", "1", "--svg", "{folder}/no/such.svg"),
            1,
            "Cannot write",
            "--svg",
        ),
    ],
)
def test_what_goes_wrong_is_said_in_one_line_with_its_fix(
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    status: int,
    what: str,
    fix: str,
) -> None:
    monkeypatch.setattr(bench_facts, "measured_rates", lambda folder: Rates(1e10, 1e9))
    (tmp_path / "short.txt").write_text("abc", encoding="utf-8")
    names = {"{short}": str(tmp_path / "short.txt"), "{folder}": str(tmp_path)}
    words = []
    for option in options:
        for name, value in names.items():
            option = option.replace(name, value)
        words.append(option)
    result = run(str(package), *words)
    assert result.exit_code == status, result.stderr
    assert what in result.stderr and fix in result.stderr.split("fix:")[1]
    assert "Traceback" not in result.stderr


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    for folder, what in ((tmp_path / "nothing", "There is no folder"), (tmp_path, "is no package")):
        result = run(str(folder), *_RUN)
        assert result.exit_code == 1 and what in result.stderr


def test_a_model_that_was_left_unchanged_is_measured_too(tmp_path: Path, text: Path) -> None:
    source = save_tiny("olmoe", tmp_path / "source")
    save_tokenizer(source)
    budget = ("--gpu", "2GB", "--device", "cpu")
    fitted = CliRunner().invoke(
        main, ("fit", str(source), "--out", str(tmp_path / "out"), *budget, "--offline", "--quiet")
    )
    assert fitted.exit_code == 0, fitted.stderr
    assert load_manifest(tmp_path / "out").method == "unchanged"
    options = ("--text", str(text), "--repeats", "1", "--json")
    value = json.loads(run(str(tmp_path / "out"), *_RUN, *options).stdout)
    assert value["decode"]["hit_rate"] is None
    # Three of eight experts of three layers, 3 matrices of 32 x 16 numbers of 4 bytes each.
    experts = 3 * 3 * 3 * 32 * 16 * 4
    read = value["decode"]["bytes_per_token"]["memory"]
    whole = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert experts < read < whole - 3 * 5 * 3 * 32 * 16 * 4
    assert value["expected"]["planned_tokens_per_second"] > 0
