"""What fits cost is kept, found again by model, and never in the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conmoe_edge.memory import outcomes
from conmoe_edge.memory.bandwidth import CACHE_DIR_VARIABLE
from conmoe_edge.memory.outcomes import Outcome, recall, remember


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


ONE = Outcome(
    "model-a", "auto", 0.25, 1, "int4", "source", 0, 1000, 0.14, 0.15, 8176, "text", "1.0"
)


def test_what_was_kept_is_found_by_model_and_the_newest_of_a_setting_wins() -> None:
    assert recall("model-a") == ()
    remember(ONE)
    remember(replace(ONE, model="model-b"))
    remember(replace(ONE, rate=0.5, loss_rise=0.3))
    remember(replace(ONE, loss_rise=0.12))
    assert recall("model-a") == (
        replace(ONE, rate=0.5, loss_rise=0.3),
        replace(ONE, loss_rise=0.12),
    )
    assert recall("model-b") == (replace(ONE, model="model-b"),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1, null, {}]",
        "[" * 5000,
        json.dumps([{"model": "model-a"}]),
        '[{"model": "model-a", "rate": NaN}]',
    ],
)
def test_a_damaged_cache_is_an_empty_one(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "outcomes.json").write_text(text)
    assert recall("model-a") == ()
    remember(ONE)
    assert recall("model-a") == (ONE,)


def test_numbers_that_are_none_are_left_out(folder: Path) -> None:
    remember(ONE)
    path = folder / "outcomes.json"
    (entry,) = json.loads(path.read_text())
    for bad in ({"kl": float("nan")}, {"rate": "0.25"}, {"tokens": True}, {"more": 1}):
        path.write_text(json.dumps([{**entry, **bad}]))
        assert recall("model-a") == ()


def test_a_cache_that_cannot_be_written_forgets(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    remember(ONE)
    assert recall("model-a") == ()


def test_it_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "_MOST_ENTRIES", 3)
    for tokens in range(6):
        remember(replace(ONE, rate=tokens / 10))
    assert [one.rate for one in recall("model-a")] == [0.3, 0.4, 0.5]
