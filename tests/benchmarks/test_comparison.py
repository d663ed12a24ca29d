"""The pure parts of ``benchmarks/compare.py``: routes, order, rows, claims, the plot, the cap."""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks.comparison.arms import (  # noqa: E402
    CELLS,
    CLAIMS,
    GIB,
    GROUPS,
    SYSTEMS,
    Cell,
    order,
)
from benchmarks.comparison.capped import run_capped, says_out_of_memory  # noqa: E402
from benchmarks.comparison.clock import Arm, Notes, run  # noqa: E402
from benchmarks.comparison.plot import plot  # noqa: E402
from benchmarks.comparison.report import claims, make_row, ratios, table  # noqa: E402
from benchmarks.comparison.traces import Replay, stretch  # noqa: E402
from benchmarks.measure import memory_cgroup  # noqa: E402


def test_the_table_of_cells_is_consistent() -> None:
    assert len({cell.key for cell in CELLS}) == len(CELLS)
    assert {cell.group for cell in CELLS} == set(GROUPS)
    assert {cell.system for cell in CELLS} == set(SYSTEMS)
    at = {(cell.system, cell.cap): cell for cell in CELLS}
    for claim in CLAIMS:
        cells = [at[name, claim.cap] for name in (claim.ours, *claim.peers)]
        assert all(cell.needed for cell in cells)
        assert len({cell.group for cell in cells}) == 1  # what is compared alternates


def test_order_goes_there_and_back() -> None:
    a, b = Cell("llama-q4", None, "x", needed=True), Cell("llama-q8", None, "x")
    assert order([a, b], 3, 1) == [(a, 0), (b, 0), (a, 1), (a, 2)]
    assert order([a, b], 2, 2) == [(a, 0), (b, 0), (b, 1), (a, 1)]


def test_stretched_routes_follow_the_small_router() -> None:
    generator = torch.Generator().manual_seed(0)
    ranking = torch.rand(3, 50, 16, generator=generator).argsort(-1)
    tokens = torch.randint(0, 20, (50,), generator=generator)
    routes = stretch(ranking, tokens, layers=8, experts=32, top_k=6)
    assert routes.shape == (8, 50, 6)
    for layer in range(8):
        assert torch.equal(routes[layer] // 2, ranking[layer * 3 // 8, :, :6])
    assert set((routes % 2).flatten().tolist()) == {0, 1}
    assert all(len(set(row.tolist())) == 6 for row in routes.reshape(-1, 6))
    # One word, one layer, one small expert: always the same half; not the same in every layer.
    again = stretch(ranking[:, :1], tokens[:1], layers=8, experts=32, top_k=6)
    assert torch.equal(again, routes[:, :1])
    same = stretch(ranking[:1, :1], tokens[:1], layers=8, experts=32, top_k=6)
    assert len({tuple(row.tolist()) for row in same[:, 0]}) > 1


def test_stretch_refuses_what_it_cannot_do() -> None:
    ranking = torch.zeros(1, 1, 6, dtype=torch.long)
    for experts, top_k in ((64, 4), (12, 8)):
        with pytest.raises(ValueError, match="cannot be stretched"):
            stretch(
                ranking, torch.zeros(1, dtype=torch.long), layers=1, experts=experts, top_k=top_k
            )


def test_replay_hands_out_positions_in_order_and_begins_again() -> None:
    routes = torch.arange(2 * 5 * 1).view(2, 5, 1)
    seen: list[list[int]] = []

    def function(module: Any, hidden: Any, index: torch.Tensor, weights: Any) -> torch.Tensor:
        seen.append(index.flatten().tolist())
        return index

    module = nn.Identity()
    replay = Replay(function, routes, lambda module: 1)
    for count in (3, 1, 3):
        replay(module, None, torch.zeros(count, 1, dtype=torch.int32), None)  # type: ignore[arg-type]
    assert seen == [[5, 6, 7], [8], [9, 5, 6]]
    replay.rewind()
    replay(module, None, torch.zeros(1, 2, 1, dtype=torch.int32), None)  # type: ignore[arg-type]
    assert seen[-1] == [5, 6]
    assert replay.calls == 4


def _run(cell: Cell, seconds: list[float], **notes: Any) -> dict[str, Any]:
    known = {"step_seconds": seconds, "steps_bytes": 10 * len(seconds), "prompt_tokens": 4}
    known |= {"dense_token_bytes": 60, "routed_token_bytes": 30}
    return {"cell": cell.key, "outcome": "ok", "peak": 5 * GIB, "notes": known | notes}


def test_rows_take_medians_and_the_longer_bound() -> None:
    cell = Cell("ours-bf16-0", None, "whole")
    runs = [_run(cell, [0.5, 0.5, 9.0], hit=0.5), _run(cell, [0.25] * 3), _run(cell, [1.0] * 3)]
    row = make_row(cell, runs, memory=1000.0, disk=100.0, cache_bytes=10.0)
    assert (row.speed, row.lowest, row.highest) == (2.0, 1.0, 4.0)
    assert (row.steps, row.read, row.hit) == (3, 10.0, 0.5)
    assert row.mean == 1.0  # of 0.3, 4 and 1: a long step counts
    assert row.bound == pytest.approx(2.0 * 0.1)  # 100 bytes of memory and 10 of disk: 0.1 s both
    slower = make_row(cell, runs, memory=1000.0, disk=50.0, cache_bytes=10.0)
    assert slower.bound == pytest.approx(2.0 * 0.2)


def test_a_cell_without_steps_says_why() -> None:
    cell = Cell("llama-q4", 4 * GIB, "4-bit")
    dead = {"outcome": "out of memory (load)", "peak": 4 * GIB, "notes": {"stage": "load"}}
    row = make_row(cell, [dead], 1.0, 1.0, 0.0)
    assert row.speed is None
    assert any("out of memory (load)" in line for line in table([row]))


def test_claims_hold_against_the_fastest_peer_that_ran() -> None:
    def row(system: str, seconds: float) -> Any:
        cell = Cell(system, 4 * GIB, "4-bit")
        return make_row(cell, [_run(cell, [seconds])], 1e9, 1e9, 0.0)

    dead = make_row(
        Cell("llama-q4", 4 * GIB, "4-bit"),
        [{"outcome": "out of memory (load)", "peak": None, "notes": {}}],
        1.0,
        1.0,
        0.0,
    )
    rows = [dead, row("llama-q4-plain", 0.2), row("ours-int4-50-d8", 0.1)]
    found = next(one for one in claims(rows) if one["ours"] == "ours-int4-50-d8")
    assert found["measured"] == pytest.approx(2.0)
    assert found["holds"] is True
    assert found["peer"] == "llama-q4-plain"
    assert found["peers_failed"] == ["llama-q4"]
    assert [one["ratio"] for one in ratios(rows)] == [pytest.approx(2.0)]
    slow = claims([row("llama-q4-plain", 0.1), row("ours-int4-50-d8", 0.1)])
    assert next(one for one in slow if one["ours"] == "ours-int4-50-d8")["holds"] is False


def test_the_plot_is_well_formed_and_has_a_row_for_each_system_and_cap() -> None:
    cells = [Cell("llama-q4", None, "x"), Cell("llama-q4", 4 * GIB, "x"), Cell("offload", GIB, "x")]
    rows = [make_row(cell, [_run(cell, [0.1 * n])], 1, 1, 0) for n, cell in enumerate(cells, 1)]
    tree = ElementTree.fromstring(plot(rows, "A & B"))
    names = [element.tag.rsplit("}", 1)[-1] for element in tree.iter()]
    assert names.count("polyline") == 0
    assert names.count("circle") == 3
    assert ElementTree.fromstring(plot([], "nothing yet")) is not None


class _Slow(Arm):
    """Takes its time by a clock of its own."""

    def load(self) -> None:
        self.fed: list[int] = []

    def prompt(self, tokens: Any) -> int:
        return len(tokens)

    def step(self, token: int) -> int:
        self.fed.append(token)
        return token + 1

    def facts(self) -> dict[str, Any]:
        return {"fed": self.fed}


def test_an_arm_stops_by_time_but_not_before_three_tokens(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.json")
    run(_Slow({}), {"prompt": [1, 2], "text": [3], "steps": 50, "seconds": 0.0}, notes)
    written = json.loads((tmp_path / "notes.json").read_text())
    assert written["stage"] == "done"
    assert written["fed"] == [3, 3, 3]  # the text's own, from its beginning again
    assert len(written["step_seconds"]) == 3
    run(_Slow({}), {"prompt": [1], "text": [2, 3], "steps": 5, "seconds": 60.0}, notes)
    assert len(json.loads((tmp_path / "notes.json").read_text())["step_seconds"]) == 5


def test_an_allocation_above_the_cap_is_told_from_other_ends() -> None:
    with memory_cgroup(1 << 30) as group:
        if group is None:
            pytest.skip("no memory cgroup can be made here")
    big = [sys.executable, "-c", "x = bytearray(400 << 20)"]
    assert run_capped(big, 200 << 20, 30, os.environ).out_of_memory
    fine = run_capped(big, 800 << 20, 30, os.environ)
    assert (fine.returncode, fine.out_of_memory) == (0, False)
    assert fine.peak is not None and fine.peak > 400 << 20
    broken = run_capped([sys.executable, "-c", "raise SystemExit(3)"], None, 30, os.environ)
    assert (broken.returncode, broken.out_of_memory, broken.timed_out) == (3, False, False)
    late = run_capped(["sleep", "30"], None, 0.2, os.environ)
    assert (late.timed_out, late.out_of_memory) == (True, False)


def test_last_words_about_memory_are_understood() -> None:
    assert says_out_of_memory("RuntimeError: [enforce fail] can't allocate memory: you tried")
    assert not says_out_of_memory("ValueError: no such file")
