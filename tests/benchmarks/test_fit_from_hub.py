"""The hub that makes its shards from a seed, and ``fit`` from it through the real command line and ``HF_ENDPOINT``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks.fit_from_hub import measure  # noqa: E402
from benchmarks.generated_checkpoint import SHAPES, repository, total_bytes  # noqa: E402
from benchmarks.hub_server import ServedFile  # noqa: E402


def test_the_true_shape_is_that_of_qwen3_30b() -> None:
    files = repository(SHAPES["qwen3-30b"])
    assert len([name for name in files if name.endswith(".safetensors")]) == 16
    index = json.loads(b"".join(_bytes(files["model.safetensors.index.json"])))
    assert index["metadata"]["total_size"] == 61_064_245_248  # as published
    assert 0 < total_bytes(files) - index["metadata"]["total_size"] < 4 << 20
    assert len(index["weight_map"]) == 18_867


def test_any_range_is_the_same_bytes() -> None:
    files = repository(SHAPES["tiny"])
    name = min(one for one in files if one.endswith(".safetensors"))
    file = files[name]
    whole = b"".join(_bytes(file))
    assert len(whole) == file.size
    draw = np.random.default_rng(3)
    for _ in range(50):
        start, stop = sorted(int(one) for one in draw.integers(0, file.size, 2))
        assert b"".join(map(bytes, file.read(start, stop))) == whole[start:stop]
    assert b"".join(_bytes(repository(SHAPES["tiny"])[name])) == whole


def _bytes(file: ServedFile) -> Iterator[bytes]:
    return map(bytes, file.read(0, file.size))


def test_fit_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_HUB_CACHE", "CONMOE_STATE_DIR", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # so that they are put back
    words = ["--rate", "0.5", "--calibration-tokens", "1024", "--method", "conmoe"]
    found = measure("tiny", "4GB", tmp_path, None, words)
    assert found["planned"]["nbytes"] < found["checkpoint_bytes"]
    # headers are read apart, and every shard here is hardly longer than what is read to see one
    assert found["fetched_bytes"] <= found["checkpoint_bytes"] + 2 * (1 << 17)
    assert found["most_disk_bytes"] <= found["planned"]["disk_bytes"] + (4 << 20)
