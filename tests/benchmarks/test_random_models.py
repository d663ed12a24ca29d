"""Packages of random numbers that the benchmarks measure: they open, run, and have the spread that is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

import conmoe_edge  # noqa: E402
from benchmarks.comparison.random_package import STD, Drawing, scales_of, write  # noqa: E402
from benchmarks.low_bits_speed import MATCHES, lines_of, results_of  # noqa: E402
from benchmarks.make_olmoe_shape import Shape  # noqa: E402
from conmoe_edge.checkpoint.format.forms import Kind, quantised_parts  # noqa: E402
from conmoe_edge.checkpoint.format.quantise import stored  # noqa: E402
from conmoe_edge.checkpoint.package.opened_package import open_package  # noqa: E402

SHAPE = Shape(layers=2, experts=8, top_k=2, hidden=128, expert_width=64, heads=4, vocab=256)


@pytest.mark.parametrize("kind", ["int8", "int4", "mxfp4", "q6", "q4", "q3", "q2"])
def test_random_bytes_have_the_spread_of_weights(kind: Kind) -> None:
    values, scales = quantised_parts("w", 128, 256, kind)
    matrix = stored(
        kind, Drawing().values(values[1], values[2]), scales_of(kind, scales[1], STD)
    ).dequantise()
    assert matrix.shape == (128, 256)
    # A power of two is all that mxfp4 has; the other forms come as close as bf16.
    assert float(matrix.std()) == pytest.approx(STD, rel=0.4 if kind == "mxfp4" else 0.02)
    assert abs(float(matrix.mean())) < STD / 20


@pytest.mark.parametrize(
    ("precision", "dense"), [("q3", "q4"), ("int4", "int8"), ("bf16", "source")]
)
def test_a_random_package_opens_and_runs(tmp_path: Path, precision: str, dense: str) -> None:
    out = tmp_path / "package"
    nbytes = write(dict(SHAPE.config()), out, precision, dense)
    opened = open_package(out, deep=True)
    assert nbytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert len(opened.manifest.prototypes) == 16
    model = conmoe_edge.load(out, budget="1GiB", device="cpu", context=64)
    logits = model(torch.tensor([[1, 2, 3, 4]])).logits[0]
    assert bool(logits.isfinite().all())
    assert len(set(logits.argmax(-1).tolist())) > 1  # tokens are told apart


def test_rows_of_routers_are_alike_where_nothing_is_skewed(tmp_path: Path) -> None:
    spreads = {}
    for skew in (0.0, 0.4):
        out = tmp_path / str(skew)
        write(dict(SHAPE.config()), out, "int4", "source", skew)
        router = conmoe_edge.load(out, budget="1GiB", device="cpu", context=64).get_parameter(
            "model.layers.0.mlp.gate.weight"
        )
        rows = router.detach().float().std(1)
        spreads[skew] = float(rows.max() / rows.min())
    assert spreads[0.0] < 1.5 < 1.8 < spreads[0.4]


def test_ratios_are_of_medians_and_the_faster_peer_counts(tmp_path: Path) -> None:
    from benchmarks.comparison.turns import Ledger

    settings = {"prompt_tokens": 4, "steps": 2, "seconds": 1, "threads": 2, "layers": 2}
    ledger = Ledger(tmp_path / "run.json", settings)
    ledger.add("rates", {"memory": 1e9})
    speeds = {"q3@IQ3_S": 0.1, "IQ3_S@q3": 0.2, "q3@Q3_K_M": 0.1, "Q3_K_M@q3": 0.12}
    for key, seconds in speeds.items():
        notes = {"step_seconds": [seconds] * 3, "first_token_seconds": 1.0, "prompt_tokens": 4}
        notes |= {"dense_token_bytes": 50e6, "routed_token_bytes": 30e6, "steps_bytes": 0}
        entry = {"cell": key, "repeat": 0, "outcome": "ok", "peak": None, "notes": notes}
        ledger.add("runs", entry)
    again = Ledger(tmp_path / "run.json", settings)
    assert again.has("q3@IQ3_S", 0)
    assert not again.has("q3@IQ3_S", 1)
    found = results_of(again, SHAPE)
    ratios = {one["match"]: one["ratio"] for one in found["matches"]}
    assert ratios == {"q3:IQ3_S": pytest.approx(2.0), "q3:Q3_K_M": pytest.approx(1.2)}
    cache = 2 * 2 * 128 * 2 * 5  # layers, keys and values, width, bytes, tokens in the middle
    ours = found["matches"][0]["ours"]
    assert ours["bound"] == pytest.approx((80e6 + cache) / 1e9 / 0.1)
    last = lines_of(found)[-1]
    assert "1.20" in last and "MISSED" in last
    assert {match.key for match in MATCHES} >= set(ratios)
    with pytest.raises(SystemExit, match="other settings"):
        Ledger(tmp_path / "run.json", {**settings, "steps": 3})


def test_turns_go_there_and_back_and_on_where_they_stopped(tmp_path: Path) -> None:
    from benchmarks.comparison.arms import Cell, order
    from benchmarks.comparison.turns import Ledger, Run, take_turns

    cells = [Cell(name, None, "", needed=True) for name in ("a", "b")]
    told: list[str] = []

    def run(name: str, repeat: int) -> Run:
        if len(told) == 3:
            raise KeyboardInterrupt
        told.append(f"{name}{repeat}")
        return {"cell": name, "repeat": repeat, "outcome": "ok", "notes": {"step_seconds": [0.5]}}

    def go_on() -> Ledger:
        ledger = Ledger(tmp_path / "run.json", {})
        wanted = [(c.system, n) for c, n in order(cells, 3, 3) if not ledger.has(c.system, n)]
        take_turns(ledger, wanted, run, lambda: {"memory": float(len(told))}, lambda: None)
        return ledger

    with pytest.raises(KeyboardInterrupt):
        go_on()
    first, told[:] = list(told), []
    ledger = go_on()
    assert (first, told) == (["a0", "b0", "b1"], ["a1", "a2", "b2"])
    assert ledger.data["rates"] == [{"memory": 0.0}, {"memory": 0.0}, {"memory": 3.0}]
    assert go_on().data == ledger.data  # nothing is left, so nothing is measured
