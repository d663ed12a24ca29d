"""A fit takes what the plan says: the whole program, beside ``plan/fit_memory.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks import fit_memory  # noqa: E402
from benchmarks.generated_checkpoint import SHAPES, Qwen3Shape  # noqa: E402

SHAPE = Qwen3Shape(2, 8, 2, 256, 128, 100_000, 4, 2, 64, 2)
"""A large vocabulary: embeddings, head and scores are most of what there is."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measured through /proc")


def test_no_moment_takes_more_than_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "wide-ends", SHAPE)
    words = ["--calibration-tokens", "1024", "--bits", "3", "--passes", "1"]
    found = fit_memory.measured("wide-ends", tmp_path / "work", "4GB", words)
    planned, most = found["planned"], found["most"]
    assert {"outside", "embed", "load", "run", "decide", "receipt"} <= most.keys()
    seen = {name: nbytes + found["libraries"] for name, (nbytes, _) in most.items()}
    print(*fit_memory.lines(found), sep="\n")
    for name, nbytes in planned["moments"].items():
        assert seen[name] <= nbytes, name
    assert planned["moment"] == "receipt"
    assert max(seen.values()) >= 0.9 * planned["bytes"]
