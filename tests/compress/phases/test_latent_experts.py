"""Experts that work in a latent space of another size than the model's hidden states (Nemotron-3 Super)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.published_configs.build import load
from benchmarks.published_configs.shrink import shrunk
from benchmarks.published_configs.small_model import write_small
from conmoe_edge import api

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = ROOT / "benchmarks" / "published_configs" / "configs"
    published = json.loads((folder / f"{PUBLISHED}.json").read_text(encoding="utf-8"))
    out = tmp_path_factory.mktemp("latent") / "source"
    write_small(shrunk(published.get("config", published)), out)
    (out.parent / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog 0123456789 " * 60
    )
    return out


@pytest.mark.parametrize(("method", "rate"), [("auto", 0.0), ("auto", 0.5), ("mone", 0.5)])
def test_a_package_loads_and_gives_the_same_logits_where_nothing_goes(
    source: Path, tmp_path: Path, method: str, rate: float
) -> None:
    text = source.parent / "text.txt"
    levers = {"budget": "4GB", "device": "cpu", "rate": rate, "method": method}
    api.fit(str(source), tmp_path / "out", calibration=text, calibration_tokens=1024, **levers)
    tokens = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = api.load(tmp_path / "out", device="cpu")(input_ids=tokens, use_cache=False).logits
        wanted = load(source)(input_ids=tokens, use_cache=False).logits
    assert bool(found.isfinite().all())
    assert bool(torch.allclose(found, wanted, atol=2e-5)) == (rate == 0.0)
