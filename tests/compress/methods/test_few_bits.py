"""Whole fits in 8 to 2 bits: what is written, what it is worth beside plain rounding, and that it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.format.records import form_of
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
from conmoe_edge.compress.methods import few_bits
from conmoe_edge.compress.phases import calibrate
from conmoe_edge.integrations.load import load_package

SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16},
}
"""The second keeps its matrices transposed, gate and up in turns, and has biases."""


@pytest.fixture(scope="module", params=sorted(SIZES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "source"
    save_tiny(request.param, folder, **SIZES[request.param])
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog 0123456789 " * 60
    )
    return folder


def fit(source: Path, out: Path, precision: str, rate: float = 0.0, **more: Any) -> Manifest:
    api.fit(
        str(source),
        out,
        budget="4GB",
        device="cpu",
        precision=precision,
        rate=rate,
        calibration=source.parent / "text.txt",
        calibration_tokens=2048,
        **more,
    )
    return load_manifest(out)


def kl(manifest: Manifest) -> float:
    assert manifest.receipt is not None
    return float(manifest.receipt["kl"])


@pytest.mark.parametrize(
    ("method", "precision", "most"),
    [
        ("auto", "q4", 0.7),
        ("auto", "q2", 0.7),
        ("conmoe", "int8", 0.95),
        ("conmoe", "int4", 0.85),
        ("conmoe", "q4", 0.85),
        ("conmoe", "q3", 0.85),
        ("conmoe", "q2", 0.85),
    ],
)
def test_every_weight_is_in_its_form_and_less_is_lost_than_by_rounding_to_the_nearest(
    source: Path,
    method: str,
    precision: str,
    most: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = fit(source, tmp_path / "fed back", precision, method=method)
    verify_package(tmp_path / "fed back", deep=True)
    for layout in found.layouts:
        assert [form_of(layout, name) for name in ("gate_up_proj", "down_proj")] == [precision] * 2
    monkeypatch.setattr(few_bits, "FED_BACK", frozenset())
    nearest = fit(source, tmp_path / "nearest", precision, method="conmoe")
    assert kl(found) < most * kl(nearest)


@pytest.mark.parametrize("method", ["reap", "mone", "hc-smoe"])
def test_methods_that_remove_experts(
    source: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some close router slots, some add constants, some merge: the same fit twice, and nearer than without feedback."""
    for name in ("one", "two"):
        found = fit(source, tmp_path / name, "q2", 0.25, method=method, scope=1)
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    plain = fit(source, tmp_path / "plain", "source", 0.25, method=method, scope=1)
    monkeypatch.setattr(few_bits, "FED_BACK", frozenset())
    nearest = fit(source, tmp_path / "nearest", "q2", 0.25, method=method, scope=1)
    assert plain.slots == found.slots == nearest.slots
    assert kl(found) < kl(nearest)


def test_two_layers_that_share_prototypes_take_the_tokens_of_the_original(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levers: dict[str, Any] = {"method": "conmoe", "scope": 2}
    found = fit(source, tmp_path / "fed back", "q2", 0.25, **levers)
    monkeypatch.setattr(few_bits, "FED_BACK", frozenset())
    assert kl(found) < kl(fit(source, tmp_path / "nearest", "q2", 0.25, **levers))


def test_fewer_neurons_in_fewer_bits(source: Path, tmp_path: Path) -> None:
    """Narrow prototypes too; and memory changes nothing of what the package says."""
    manifest = fit(source, tmp_path / "out", "q3", 0.5)
    assert manifest.plan is not None
    planned = manifest.plan["chosen"]["pool_bytes"]
    written = sum(manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes)
    assert written <= planned
    prompt = torch.tensor([[5, 9, 33, 12, 60, 61, 7, 8, 20]])
    seen = []
    for slots in (None, (1,) * len(manifest.layouts)):
        model = load_package(tmp_path / "out", device="cpu", slots=slots)
        with torch.no_grad():
            seen.append(model(input_ids=prompt, use_cache=False).logits)
    assert torch.equal(*seen)


def test_the_same_fit_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        fit(source, tmp_path / name, "q3", 0.25)
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("levers", [{"precision": "q3", "rate": 0.25}, {"bits": 4.5}])
def test_the_stream_goes_on_behind_what_was_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levers: dict[str, Any]
) -> None:
    """The written prototypes need not be run: what is left of the aim says where they take the stream."""
    propagate, apart = calibrate.propagate, []

    def both(run: Any, model: Any, index: int, stream: Any, entered: Any, left: Any) -> None:
        if entered is None:  # a layer without experts
            return propagate(run, model, index, stream, entered, left)
        before = entered.before.clone()
        propagate(run, model, index, stream, entered, left)
        short, again = stream.hidden, replace(entered, before=before.clone())
        propagate(run, model, index, stream, again, None)
        assert left is not None
        apart.append(float((short - stream.hidden).norm() / (stream.hidden - before).norm()))
        return None

    monkeypatch.setattr(calibrate, "propagate", both)
    text = source.parent / "text.txt"
    settings: dict[str, Any] = {"budget": "4GB", "device": "cpu", "calibration_tokens": 1024}
    api.fit(str(source), tmp_path / "out", calibration=text, passes=1, **settings, **levers)
    assert apart and max(apart) < 1e-3
