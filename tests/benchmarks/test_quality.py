"""The quality benchmark: cells on a tiny model, resuming, the report's arithmetic, the picture."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from families import save_tiny, save_tokenizer

from benchmarks import quality
from benchmarks.quality_plot import plot
from benchmarks.quality_report import Cell, claim_lines, lines


def cell(method: str, rate: float, seed: int, rise: float) -> Cell:
    size = round(20e6 * (1 - rate))
    return Cell(
        method, method, rate, 1, seed, rise, rise, 0.7, size, size + 10**6, 9.0, method != "auto"
    )


def test_claims_are_held_against_the_best_published_method_of_each_seed() -> None:
    cells = [
        cell("conmoe", 0.5, 0, 0.40),
        cell("reap", 0.5, 0, 0.20),
        cell("auto", 0.5, 0, 0.10),
        cell("conmoe", 0.5, 1, 0.10),
        cell("reap", 0.5, 1, 0.30),
        cell("auto", 0.5, 1, 0.08),
    ]
    said = list(claim_lines(cells))
    assert said[0] == "50 %, seed 0: best published reap +0.2000; auto +0.1000, ratio 0.50"
    assert said[1] == "50 %, seed 1: best published conmoe +0.1000; auto +0.0800, ratio 0.80"
    assert said[2].endswith("at or below the best single method: HOLDS")
    assert said[3] == "50 %: at most 0.7 x its rise: MISSED (0.80 at worst)"
    shared = replace(cell("reap", 0.5, 1, 0.04), scope=2)
    said = list(claim_lines([*cells, shared]))
    assert said[1] == (
        "50 %, seed 1: best published reap over 2 layers +0.0400; auto +0.0800, ratio 2.00"
    )


def test_the_table_has_mean_and_spread() -> None:
    text = "\n".join(
        lines(
            [cell("conmoe", 0.25, 0, 0.10), cell("conmoe", 0.25, 1, 0.20)],
            {
                "model": "demo",
                "cells": {f"x|0.25|2|{seed}": {"refused": "no scope of two."} for seed in (0, 1)},
            },
        )
    )
    row = next(line for line in text.splitlines() if line.startswith(" 25%"))
    assert row.split()[2:6] == ["conmoe", "+0.1500", "+0.1000", "+0.2000"]
    assert text.count("x, scope 2: no scope of two.") == 1


def test_the_picture_has_every_method_and_names_that_do_not_cover_each_other() -> None:
    names = [f"m{number}" for number in range(15)] + ["auto"]
    cells = [
        cell(name, rate, seed, 0.1 + rate + 0.001 * number + 0.01 * seed)
        for number, name in enumerate(names)
        for rate in (0.25, 0.5, 0.75)
        for seed in (0, 1)
    ]
    root = ET.fromstring(plot(cells, "title"))
    space = "{http://www.w3.org/2000/svg}"
    found = [t for t in root.iter(f"{space}text") if "name" in (t.get("class") or "")]
    assert sorted(t.text or "" for t in found) == sorted(names)
    heights = sorted(float(t.get("y") or 0) for t in found)
    assert min(b - a for a, b in itertools.pairwise(heights)) > 12
    assert heights[0] > 0 and heights[-1] < 560


def test_a_method_is_drawn_once_in_its_best_scope() -> None:
    cells = [cell(name, 0.5, 0, 0.3) for name in ("reap", "reap+drop", "conmoe", "auto")]
    cells += [replace(cell("reap", 0.5, 0, 0.2), scope=2), replace(cells[2], scope=2)]
    root = ET.fromstring(plot(cells, "title"))
    space = "{http://www.w3.org/2000/svg}"
    found = {t.text for t in root.iter(f"{space}text") if "name" in (t.get("class") or "")}
    assert found == {"reap, scope 2", "conmoe", "auto"}


def test_cells_are_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny("olmoe", tmp_path / "model")
    save_tokenizer(model)
    words = ["--model", str(model), "--methods", "conmoe", "--rates", "0.5", "--seeds", "0", "1"]
    words += ["--calibration-tokens", "512", "--work", str(tmp_path / "work")]
    words += ["--results", str(tmp_path / "results")]
    assert quality.main(words) == 0
    first = capsys.readouterr().out
    assert "[1/2] conmoe|0.5|1|0" in first and "[2/2]" in first
    data = json.loads((tmp_path / "results" / "quality.json").read_text())
    one, two = data["cells"]["conmoe|0.5|1|0"], data["cells"]["conmoe|0.5|1|1"]
    assert one["loss_original"] == two["loss_original"] and one["loss"] != two["loss"]
    assert one["prototype_bytes"] == two["prototype_bytes"] < one["package_bytes"]
    monkeypatch.setattr(quality, "_run", lambda *_: pytest.fail("run again"))
    assert quality.main(words) == 0
    assert "[1/2]" not in capsys.readouterr().out
    assert quality.main([*words, "--methods", "no-such"]) == 2
