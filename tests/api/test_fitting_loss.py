"""The smallest package whose loss rises by no more: how it is looked for, and one that is found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.api.fitting_loss import (
    LEAST_BITS,
    MOST_BITS,
    MOST_FITS,
    fit_within_loss,
    put,
    put_back,
    rise_of,
    search,
)
from conmoe_edge.checkpoint.format.manifest import MANIFEST_NAME
from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
from conmoe_edge.errors import OutputExists, UsageError
from conmoe_edge.plan.request import PlanRequest


@pytest.mark.parametrize("wanted", [0.0005, 0.004, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("steep", [0.6, 1.3, 2.5])
@pytest.mark.parametrize("level", [0.05, 1.0, 10.0])
def test_few_fits_find_what_is_close(wanted: float, steep: float, level: float) -> None:
    """Losses that fall by a power of e with a bit."""

    def rise(bits: float) -> float:
        return level * math.exp(-steep * bits)

    asked: list[float] = []

    def fitted(bits: float) -> tuple[Any, float]:
        assert LEAST_BITS <= bits <= MOST_BITS
        asked.append(bits)
        return bits, rise(bits)

    best, tried = search(wanted, fitted)
    assert [one.bits for one in tried] == asked and len(asked) <= MOST_FITS
    assert len(set(asked)) == len(asked)
    keeping = [one.bits for one in tried if one.rise <= wanted]
    assert best == (min(keeping) if keeping else None)
    if rise(MOST_BITS) <= wanted * 0.9:
        assert best is not None
        exact = max(LEAST_BITS, math.log(level / wanted) / steep)
        assert rise(best) <= wanted  # type: ignore[arg-type]
        assert best - exact <= 0.35  # type: ignore[operator]


def test_a_rise_within_the_noise_is_measured_by_the_divergence() -> None:
    receipt = {"loss_original": 2.0, "loss_consolidated": 1.9995, "kl": 0.001}
    assert rise_of(receipt) == 0.001
    assert rise_of({**receipt, "loss_consolidated": 2.01}) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "levers",
    [
        {"bits": 3.0},
        {"rate": 0.25},
        {"precision": "int4"},
        {"widths": "equal"},
        {"min_speed": 5.0},
        {"engine": "hf"},
    ],
    ids=lambda one: next(iter(one)),
)
def test_what_fixes_the_bytes_does_not_go_with_it(levers: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        fit_within_loss("demo", tmp_path / "out", 0.01, PlanRequest(**levers))
    assert "leave out" in caught.value.fix
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError):
            fit_within_loss("demo", tmp_path / "out", wrong)


def test_a_folder_that_is_no_package_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputExists):
            fit_within_loss("demo", tmp_path / "out", 0.01, overwrite=overwrite)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_package_that_keeps_to_it_is_found_and_nothing_else_is_left(tmp_path: Path) -> None:
    source = save_tiny(
        "qwen3_moe", tmp_path / "source", hidden_size=64, moe_intermediate_size=64, head_dim=16
    )
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    request = PlanRequest(budget="4GB", device="cpu", calibration_tokens=512)
    report, tried = api.fit_within_loss(
        str(source), tmp_path / "out", 0.0002, request, calibration=text
    )
    verify_package(tmp_path / "out", deep=True)
    manifest = load_manifest(tmp_path / "out")
    assert report.out == tmp_path / "out"
    kept = [one for one in tried if one.rise <= 0.0002]
    assert kept and rise_of(dict(manifest.receipt)) == min(kept, key=lambda one: one.bits).rise
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "text.txt"]


@pytest.mark.parametrize("former", ["former", ""])
def test_a_package_is_put_in_its_place_whole_wherever_that_is_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: str
) -> None:
    """The process ends before each of its durable steps in turn, until there is none left."""

    class Ended(BaseException):
        pass

    def end_at(step: int) -> None:
        left = iter(range(step, -1, -1))

        def count() -> None:
            if next(left, 1) == 0:
                raise Ended

        monkeypatch.setattr(durable, "_step", count)

    def said(place: Path) -> str:
        return (place / MANIFEST_NAME).read_text() if place.exists() else ""

    for step in range(20):
        place, folder = tmp_path / str(step) / "out", tmp_path / str(step) / ".out.max-loss"
        for path, text in ((place, former), (folder / "2.60", "new")):
            if text:
                path.mkdir(parents=True)
                (path / MANIFEST_NAME).write_text(text)
        end_at(step)
        try:
            put(folder / "2.60", place, folder)
            break
        except Ended:
            monkeypatch.undo()
        put_back(place, folder)
        assert said(place) in (former, "new"), step
        assert said(place) == "new" or said(folder / "2.60") == "new", step
        put_back(place, folder)
        if said(place) != "new":
            put(folder / "2.60", place, folder)
            assert said(place) == "new" and not folder.exists(), step
    else:
        raise AssertionError("it has no end")
    assert step > 2 and said(place) == "new" and not folder.exists()
