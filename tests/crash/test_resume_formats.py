"""A fit with dense matrices in 4 bits, or with keys and values in 8, that is killed ends with the same bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, save_tokenizer

from conmoe_edge.checkpoint.fs.durable import CRASH_STATUS
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
from tests.crash.test_kill_resume import child, digests, finish, fit, leftovers

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the test forks, so that torch is imported once"
)
SETTINGS: dict[str, dict[str, Any]] = {
    "q4": {"method": "auto", "precision": "q3", "dense_precision": "q4"},
    "q4 beside unchanged experts": {
        "method": "conmoe",
        "precision": "source",
        "dense_precision": "q4",
    },
    "int8 keys": {"method": "auto", "precision": "q3", "kv_precision": "int8"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    wide = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "head_dim": 32}
    save_tiny("qwen3_moe", folder, mlp_only_layers=[], **wide)
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    return folder


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_killed_in_the_middle(name: str, source: Path, tmp_path: Path) -> None:
    """Between layers, at durable steps inside one, and while the receipt is measured."""
    asked = {**SETTINGS[name], "scope": 1}
    whole = tmp_path / "whole" / "out"
    assert finish(child(lambda: fit(source, whole, **asked))) == 0
    manifest = load_manifest(whole)
    assert manifest.dense_precision == asked.get("dense_precision", "source")
    assert manifest.kv_precision == asked.get("kv_precision", "source")
    wanted = digests(whole)

    def stop(stage: str, layer: int) -> Any:
        def progress(step: Any) -> None:
            if (step.stage, step.step) == (stage, layer):
                os._exit(CRASH_STATUS)

        return progress

    out = tmp_path / "killed" / "out"
    for stage, layer in (("calibrate", 1), ("calibrate", 2), ("receipt", 1)):
        at = stop(stage, layer)
        killed = child(lambda at=at: fit(source, out, progress=at, **asked))
        assert finish(killed) == CRASH_STATUS and not out.exists()
    assert finish(child(lambda: fit(source, out, **asked))) == 0
    verify_package(out, deep=True)
    assert digests(out) == wanted and leftovers(out.parent) == []
    for step in (22, 31):
        out = tmp_path / str(step) / "out"
        assert finish(child(lambda out=out: fit(source, out, **asked), step)) == CRASH_STATUS
        assert finish(child(lambda out=out: fit(source, out, **asked))) == 0
        assert digests(out) == wanted, f"killed at step {step}"
