"""``conmoe_edge.bench``: its prompts, and a report of a real package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import save_tokenizer, tiny_model
from hand_packages import thirds, write_package

import conmoe_edge
from conmoe_edge.api import bench_facts
from conmoe_edge.api.bench_facts import Rates
from conmoe_edge.api.benching import prompts_of
from conmoe_edge.errors import PackageError
from conmoe_edge.model.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benching") / "package"
    model = tiny_model("olmoe")
    write_package(model, folder, thirds(model))
    save_tokenizer(folder)
    return folder


def test_the_same_seed_takes_the_same_prompts(package: Path) -> None:
    tokenizer = load_tokenizer(package)
    text = "".join(chr(97 + number % 26) for number in range(400))
    asked: dict[str, Any] = {"length": 30, "tokens": 4, "repeats": 3, "seed": 1, "context": 128}
    first, again = (prompts_of(tokenizer, text, **asked) for _ in range(2))
    other = prompts_of(tokenizer, text, **{**asked, "seed": 2})
    assert first == again != other
    assert {len(one) for one in first} == {30} and len({tuple(one) for one in first}) == 3
    assert len(prompts_of(tokenizer, text, **{**asked, "repeats": 50})) == 50


def test_a_package_is_measured_from_python(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_facts, "measured_rates", lambda folder: Rates(1e10, 1e9))
    (tmp_path / "text.txt").write_text("abcdefgh" * 60, encoding="utf-8")
    stages: list[str] = []
    report = conmoe_edge.bench(
        package,
        budget="2GB",
        device="cpu",
        prompt_tokens=40,
        tokens=6,
        repeats=2,
        text=tmp_path / "text.txt",
        on_stage=stages.append,
        on_round=lambda number, one: stages.append(f"round {number}"),
    )
    assert stages == ["machine", "load", "run", "round 0", "round 1"]
    assert len(report.rounds) == 2 and report.decode.tokens_per_second.low > 0
    assert report.facts.settings["text"] == "text.txt"
    assert report.facts.budget.device_bandwidth == 1e10
    value = report.to_json()
    assert value["package"]["path"] == str(package)


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError):
        conmoe_edge.bench(tmp_path)
