"""True shapes: checkpoints from a seed, bounds of a fit, cells and tables, and the whole of it on a tiny shape."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks import true_shapes  # noqa: E402
from benchmarks.comparison import large  # noqa: E402
from benchmarks.comparison.turns import Ledger  # noqa: E402
from benchmarks.fit_bounds import Rates, Sizes, parts_of  # noqa: E402
from benchmarks.generated_checkpoint import (  # noqa: E402
    SHAPES,
    entries,
    repository,
    router_row,
)
from benchmarks.true_shapes import CELLS, Cell, facts_of, lines_of, summary  # noqa: E402
from conmoe_edge.model.deepseek import DeepseekConfig  # noqa: E402
from conmoe_edge.model.probe import TensorFacts, check_model  # noqa: E402


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [
        ("qwen3-30b", 61_064_245_248),
        ("deepseek-16b", 32_751_456_256),
        ("gpt-oss-20b", 13_761_264_768),
        ("olmoe-7b", 13_838_323_712),
    ],
)
def test_checkpoints_have_the_published_bytes(shape: str, nbytes: int) -> None:
    assert sum(one.nbytes for one in entries(SHAPES[shape])) == nbytes


def test_the_generated_deepseek_is_one() -> None:
    shape = dataclasses.replace(SHAPES["deepseek-16b"], layers=3, experts=8)
    headers = {one.name: TensorFacts("bfloat16", one.nbytes, one.shape) for one in entries(shape)}
    config = DeepseekConfig.from_dict(shape.config())
    check_model(config, headers)  # raises where a tensor is missing, has no place or another shape
    del headers["model.layers.1.mlp.shared_experts.up_proj.weight"]
    with pytest.raises(Exception, match="shared_experts"):
        check_model(config, headers)


def test_rows_of_routers_differ_and_embeddings_are_wide() -> None:
    lengths = [router_row(one, 64) for one in range(64)]
    assert (min(lengths), max(lengths)) == pytest.approx((0.6, 1.4))
    assert len(set(lengths)) == 64
    shape = SHAPES["tiny"]
    files = repository(shape)
    found = {name: _numbers(files, name) for name in ("embed_tokens", "layers.0.mlp.gate")}
    assert float(found["embed_tokens"].std()) == pytest.approx(1.0, rel=0.02)
    spreads = found["layers.0.mlp.gate"].std(axis=1) / 0.02
    expected = [router_row(one, shape.experts) for one in range(shape.experts)]
    assert np.corrcoef(spreads, expected)[0, 1] > 0.8


def _numbers(files: Any, name: str) -> Any:
    """A bf16 matrix of a generated repository."""
    for file in (one for key, one in files.items() if key.endswith(".safetensors")):
        head = int.from_bytes(b"".join(file.read(0, 8)), "little")
        table = json.loads(b"".join(file.read(8, 8 + head)))
        for key, entry in table.items():
            if name in key and key.endswith(".weight"):
                start, stop = (8 + head + one for one in entry["data_offsets"])
                raw = np.frombuffer(b"".join(map(bytes, file.read(start, stop))), np.uint16)
                return (raw.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
    raise KeyError(name)


def test_work_is_counted_layer_by_layer() -> None:
    olmoe = Sizes.of(SHAPES["olmoe-7b"].config(), 0)
    once = 16 * (4 * 2 * 2048**2 + 2 * 2 * 2048 * 513 / 2 + 2 * 2048 * 64)
    assert olmoe.attention_flops(10) == pytest.approx(10 * once)
    whole = [(1024, 16 * 64)]
    assert olmoe.rounding_flops(0, whole) == pytest.approx(
        16 * 64 * (2 * 1024 * 2048**2 + 2048 * 1024**2 + (2048**3 + 1024**3) / 3)
    )
    more = olmoe.rounding_flops(10, whole) - olmoe.rounding_flops(0, whole)
    assert more == pytest.approx(16 * 10 * 8 * (2048**2 + 1024**2))
    deep = SHAPES["deepseek-16b"]
    two, three = (
        Sizes.of(dataclasses.replace(deep, layers=n).config(), 0).attention_flops(8) for n in (2, 3)
    )
    assert Sizes.of(deep.config(), 0).moe_layers == 27
    shared = 3 * 2 * 2048 * 2 * 1408
    attention = 2 * 2 * 2048 * 4096 + 2 * 2 * 2048 * 513 / 2
    assert three - two == pytest.approx(8 * (attention + 2 * 2048 * 64 + shared))
    assert Sizes.of(SHAPES["gpt-oss-20b"].config(), 0).experts == 32
    with pytest.raises(ValueError, match="mixtral"):
        Sizes.of({"model_type": "mixtral"}, 0)


def test_the_work_of_auto_is_counted_by_hand() -> None:
    """Multiply-adds twice, Gram matrices half: as docs/auto.md has the steps."""
    olmoe = Sizes.of(SHAPES["olmoe-7b"].config(), 0)
    hidden, width, layers, experts, visits = 2048, 1024, 16, 64, 100 * 8
    seen = visits * (2 * 2 * hidden * width + width**2)
    worth = layers * (seen + experts * width**3)
    assert olmoe.narrowing_flops(100, choosing_bits=False) == pytest.approx(worth)
    pivots = layers * experts * width**3 / 3
    assert olmoe.narrowing_flops(100, choosing_bits=True) == pytest.approx(worth + pivots)

    kept = [(1024, 300), (512, 100)]  # of all layers
    each = layers * visits / 400
    wide = 10 * hidden * width * each + width**3 / 3 + 2 * width**2 * hidden
    narrow = 10 * hidden * 512 * each + 512**3 / 3 + 2 * 512**2 * hidden
    refit = 300 * wide + 100 * narrow
    assert olmoe.refit_flops(100, kept, rounds=True) == pytest.approx(refit)
    grams = each * (300 * width**2 + 100 * 512**2)
    assert olmoe.refit_flops(100, kept, rounds=False) == pytest.approx(refit + grams)


@pytest.mark.parametrize(("tokens", "fitted"), [(512, 2), (8192, 4), (32768, 6)])
def test_the_work_of_the_survey_is_counted_by_hand(tokens: int, fitted: int) -> None:
    olmoe = Sizes.of(SHAPES["olmoe-7b"].config(), 0)
    kept = [(512, 16 * 64)]  # stand-ins are half as wide
    found = olmoe.survey_flops(tokens, kept, choosing_bits=True)
    own, others = (fitted + 6) * 512, 12 * 512
    assert found.attention == pytest.approx(olmoe.attention_flops(own + others))
    assert found.experts == pytest.approx(olmoe.experts_flops(own + others / 2, 16 * 8))
    assert found.narrowing == olmoe.narrowing_flops(fitted * 512, choosing_bits=True)
    assert found.all() == pytest.approx(found.attention + found.experts + found.narrowing)


def test_parts_of_a_fit_by_auto(tmp_path: Path) -> None:
    """Which work stands beside which part, at a rate of 1 FLOP and 1 byte a second."""
    olmoe = dataclasses.replace(Sizes.of(SHAPES["olmoe-7b"].config(), 10_000), moe_layers=1)
    names = ("attention", "experts up", "experts down", "head", "distance")
    rates = Rates(1.0, 1.0, dict.fromkeys(names, 1.0))
    division = [{"width": 1024, "prototypes": 60}, {"width": 512, "prototypes": 4}]
    report: dict[str, Any] = {
        "receipt": {"tokens": 512},
        "division": division,
        "fetching": {"nbytes": 25_000},
        "seconds": {"method": 5.0, "survey": 3.0, "journal": 1.0},
    }
    manifest: dict[str, Any] = {"method": "auto", "precision": "free", "scope": 1, "remap": {}}

    def bounds() -> dict[str, float | None]:
        (tmp_path / "conmoe.json").write_text(json.dumps(manifest))
        return {one.name: one.bound for one in parts_of(olmoe, rates, report, tmp_path, 1024)}

    kept = [(1024, 60), (512, 4)]
    found = bounds()
    worth = olmoe.narrowing_flops(1024, choosing_bits=True)
    refit = olmoe.refit_flops(1024, kept, rounds=True)
    assert found["method"] == pytest.approx(olmoe.rounding_flops(1024, kept) + worth + refit)
    survey = olmoe.survey_flops(1024, kept, choosing_bits=True)
    assert found["survey"] == pytest.approx(survey.all())
    assert found["read"] == pytest.approx(25_000)
    assert found["journal"] is None
    del report["seconds"]["survey"], report["fetching"]
    manifest["precision"] = "source"
    found = bounds()
    assert "survey" not in found and found["read"] == pytest.approx(10_000)
    worth = olmoe.narrowing_flops(1024, choosing_bits=False)
    refit = olmoe.refit_flops(1024, kept, rounds=False)
    assert found["method"] == pytest.approx(worth + refit)
    report["division"] = [{"width": 1024, "prototypes": 64}]  # nothing changes, nothing is solved
    assert bounds()["method"] is None


def test_cells_are_read_and_named() -> None:
    assert Cell.of("qwen3-30b/16:5GB") == Cell("qwen3-30b", "5GB", 16)
    assert Cell.of("gpt-oss-20b/2x8:3.5GB", 4).key == "gpt-oss-20b/2x8:3.5GB"
    assert Cell.of("olmoe-7b:8GB", 2, 16).key == "olmoe-7b/2x16:8GB"
    small = Cell.of("olmoe-7b:8GB", 2, 4).checkpoint()
    assert small.config()["num_experts_per_tok"] == 4
    assert len({Cell.of(one).slug for one in CELLS}) == len(CELLS)
    for wrong in ("qwen9:8GB", "qwen3-30b", "qwen3-30b/x8:8GB"):
        with pytest.raises(ValueError, match="is no SHAPE"):
            Cell.of(wrong)


def test_predictions_stand_beside_what_was_measured(tmp_path: Path) -> None:
    settings = {"calibration_tokens": 1, "prompt_tokens": 2, "tokens": 3, "fit_limit": 8 << 30}
    settings |= {"router_skew": 0.4}
    ledger = Ledger(tmp_path / "run.json", settings)
    rates = {"read": 1e9, "write": 1e9, "gemm": {"head": 1e11}, "hub": 1e9}
    chosen = {"precision": "free", "bits": 3.0, "resident_share": 0.5}
    plan = {"chosen": chosen, "device_bytes_used": 8_000_000_000, "disk_bytes": 9_000_000_000}
    done: dict[str, Any] = {
        "plan": plan,
        "parts": [{"name": "read", "seconds": 8.0, "bound": 4.0, "work": "2 GB"}],
        "rates": rates,
        "seconds": 100.0,
        "bound_seconds": 50.0,
        "layers": 4,
        "resumed": True,
        "peak_anonymous_bytes": 1e9,
        "peak_rss_bytes": 2e9,
        "limit_bytes": 8_000_000_000,
        "most_disk_bytes": 3e9,
        "package_bytes": 2e9,
    }
    speed = {"tokens_per_second": {"median": 9.0}, "hit_rate": 0.7}
    expected = {
        "tokens_per_second": 10.0,
        "measured_ratio": 0.9,
        "planned_tokens_per_second": 11.0,
    }
    report = {
        "decode": speed | {"bound": {"share_of_serial": 0.6}},
        "prefill": {"tokens_per_second": {"median": 90.0}},
        "expected": expected,
        "memory": {"used_bytes": 7e9},
        "runtime": {"kernel": "torch"},
    }
    key = "olmoe-7b:8GB"
    for stage, entry in (
        ("plan", {"seconds": 1.5}),
        ("fit", done),
        (
            "bench",
            {
                "report": report,
                "peak_anonymous_bytes": 8_000_000_000 - (300 << 20),
                "library_bytes": 400 << 20,
            },
        ),
    ):
        ledger.add("runs", {"cell": f"{key} {stage}", "repeat": 0, "outcome": "ok", **entry})
    other = {"cell": "olmoe-7b:12GB plan", "repeat": 0, "outcome": "plan ended with 5\nmore"}
    ledger.add("runs", other)
    rows = [summary(one, facts_of(ledger, one)) for one in (key, "olmoe-7b:12GB")]
    assert rows[0]["seconds_a_layer"] == 25.0
    assert (rows[0]["speed_ratio"], rows[0]["memory_difference"]) == (0.9, 100 << 20)
    text = "\n".join(lines_of(rows, ledger))
    assert "went on; seconds are of the last run" in text
    assert "+100 MiB  kernel: torch" in text
    assert "plan: plan ended with 5" in text and "more" not in text.split("plan ended with 5")[1]
    assert "read" in text and "2.00  2 GB" in text


def test_ratios_of_a_large_cell(tmp_path: Path) -> None:
    for one in large.LARGE.values():
        assert [arm.key for arm in one.arms].count("ours") == 1
        assert len({arm.key for arm in one.arms}) == len(one.arms)
        assert one.key in large.disk_help()
    cell = large.LARGE["qwen3-30b:15GB"]
    settings = {"prompt_tokens": 4, "steps": 2, "seconds": 1.0, "threads": 2, "layers": None}
    ledger = Ledger(tmp_path / "run.json", settings)
    ledger.add("rates", {"memory": 10e9, "disk": 1e9})
    for arm, seconds in (("ours", 0.1), ("q4-k-m", 0.5), ("iq3-s", 0.11)):
        notes: dict[str, Any] = {"step_seconds": [seconds] * 3, "first_token_seconds": 10 * seconds}
        notes |= {"dense_token_bytes": 5e8, "routed_token_bytes": 1e8, "tokens": [1, 2, 1, 1]}
        notes |= {"steps_bytes": 0, "load_seconds": 1.0, "stats": {"kernel": "native, AVX2"}}
        run = {"cell": f"qwen3-30b-15GB-{arm}", "repeat": 0, "outcome": "ok", "peak": 1}
        ledger.add("runs", {**run, "notes": notes, "file_bytes": 13e9})
    rows = large.rows_of(cell, ledger, 0.0)
    assert [row["ratio"] for row in rows] == [None, pytest.approx(5.0), pytest.approx(1.1)]
    text = large.lines_of(cell, ledger, rows)
    assert next(line for line in text if "Q4_K_M" in line).endswith("holds")
    assert next(line for line in text if "IQ3_S" in line).endswith("MISSED")
    assert "only 50% of its tokens differ" not in text[4]  # half is not less than half
    assert text[-1].endswith("holds")


@pytest.mark.slow
def test_all_stages_on_a_tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_HUB_CACHE", "CONMOE_STATE_DIR", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # so that they are put back
    monkeypatch.setattr(true_shapes, "RESULTS", tmp_path / "results")
    words = ["--work", str(tmp_path), "--only", "tiny:700MB", "--calibration-tokens", "1024"]
    words += ["--prompt-tokens", "32", "--tokens", "8", "--no-limit", "--name", "tiny"]
    true_shapes.main([*words, "--", "--bits", "3"])
    data = json.loads((tmp_path / "results" / "tiny.json").read_text())
    (row,) = data["rows"]
    assert row["bits"] == 3.0 and row["speed"] > 0 and row["bound_seconds"] > 0
    assert [run["outcome"] for run in data["runs"]] == ["ok"] * 3
    assert not (tmp_path / "tiny-700MB").exists()  # the package is gone
    true_shapes.main([*words, "--", "--bits", "3"])  # nothing is run again
    assert len(json.loads((tmp_path / "results" / "tiny.json").read_text())["runs"]) == 3
