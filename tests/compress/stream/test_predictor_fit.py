"""The predictor of the next layer: the closed form against brute force, files, and a fit that stops and goes on."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, save_tokenizer
from safetensors.torch import load_file

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import PREDICTOR_FILE
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.compress.stream.predictor_fit import RIDGE, PredictorFit, held_sequences, ridge
from conmoe_edge.errors import DoesNotFit


def test_ridge_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, generator=generator) * 3 + 2
    y = (torch.rand(50, 5, generator=generator) < 0.3).float()
    found = ridge(x, y)
    # The same as ordinary least squares with a row for every penalised weight: sqrt(lambda) w = 0.
    wide = x.double()
    penalty = RIDGE * (wide - wide.mean(0)).square().sum() / 50
    rows = torch.cat([wide, torch.ones(50, 1, dtype=torch.float64)], 1)
    extra = torch.cat([penalty.sqrt() * torch.eye(7), torch.zeros(7, 1)], 1).double()
    target = torch.cat([y.double(), torch.zeros(7, 5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat([rows, extra]), target).solution
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_rows_that_are_all_the_same_give_the_frequencies() -> None:
    y = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    found = ridge(torch.ones(2, 3), y)
    assert torch.equal(found, torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 0.5]]))


def test_which_sequences_are_held_out() -> None:
    assert held_sequences([8]) == [False] * 6 + [True] * 2
    assert held_sequences([2, 1]) == [False, False, True]
    assert held_sequences([1] * 9) == [False, False, False, True] * 2 + [False]


def _planted(tmp_path: Path) -> tuple[PredictorFit, torch.Tensor, list[int]]:
    """Two layers; in the second the router takes the slots of the two largest of eight hidden values."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(800, 8, generator=generator).bfloat16()
    slots = hidden.float().topk(2).indices
    lengths = [100] * 8
    fit = PredictorFit(tmp_path, lengths, torch.device("cpu"))
    fit.layer(3, None, hidden, torch.zeros(800, 2, dtype=torch.uint8), 8)
    fit.layer(5, 3, torch.zeros(800, 8), slots.to(torch.uint8), 8)
    return fit, hidden, lengths


def _map(layer: int, targets: list[int]) -> SlotMap:
    count = len(targets)
    return SlotMap(layer, tuple(targets), (1.0,) * count, (NONE,) * count)


def test_it_predicts_what_depends_on_the_state_and_adds_up_slots(tmp_path: Path) -> None:
    fit, hidden, lengths = _planted(tmp_path)
    numbers = {3: [0, 0, 1, 1, -1, 0, 0, 0], 5: [9, 4, 4, 6, -1, 9, 8, 6]}
    maps = {layer: _map(layer, targets) for layer, targets in numbers.items()}
    written = fit.write(tmp_path, maps)
    tensors = load_file(tmp_path / written.name)
    assert written.name == PREDICTOR_FILE and list(tensors) == ["predictor.5"]
    weights = tensors["predictor.5"]
    assert weights.dtype == torch.bfloat16 and weights.shape == (9, 4)  # of 4, 6, 8, 9
    predictions = fit.predictions(maps)
    assert predictions.tokens == tuple(i for i, held in enumerate(held_sequences(lengths)) if held)
    assert predictions.ranked[0] == ((),) * 200
    rows = hidden[list(predictions.tokens)].float()
    by_file = rows @ weights[:-1].float() + weights[-1].float()
    first = [(4, 6, 8, 9)[int(row.argmax())] for row in by_file]
    same = sum(row[0] == one for row, one in zip(predictions.ranked[1], first, strict=True))
    assert same >= 195, "the ranking is that of the file, but for its rounding"
    asked = [
        {numbers[5][slot] for slot in row if numbers[5][slot] >= 0}
        for row in rows.topk(2).indices.tolist()
    ]
    hits = sum(ranked[0] in one for ranked, one in zip(predictions.ranked[1], asked, strict=True))
    assert hits >= 160, "by chance it would be every second one"


def test_slots_that_are_none_are_left_out(tmp_path: Path) -> None:
    fit = PredictorFit(tmp_path, [4, 4], torch.device("cpu"))
    fit.layer(0, None, torch.zeros(8, 3), torch.zeros(8, 2, dtype=torch.uint8), 2)
    fit.layer(1, 0, torch.zeros(8, 3), torch.tensor([[1, 2]] * 8, dtype=torch.uint8), 2)
    fit.write(tmp_path, {0: _map(0, [0, 1]), 1: _map(1, [2, 3])})
    found = load_file(tmp_path / PREDICTOR_FILE)["predictor.1"]
    assert torch.equal(found[-1].float(), torch.tensor([0.0, 1.0]))


class Stop(Exception):
    """Ends a fit between two layers."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny("qwen3_moe", folder, mlp_only_layers=[], moe_intermediate_size=2048)
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog 0123456789 " * 30
    )
    return folder


def _fit(source: Path, out: Path, **more: Any) -> None:
    settings: dict[str, Any] = {
        "device": "cpu",
        "rate": 0.25,
        "precision": "source",
        "method": "conmoe",  # nothing is measured on every neuron of such wide experts
        "calibration": source.parent / "text.txt",
        "calibration_tokens": 512,
    }
    api.fit(str(source), out, **{**settings, **more})


def _least(source: Path) -> str:
    """The smallest budget: not every prototype is resident in it."""
    with pytest.raises(DoesNotFit) as error:
        api.plan(
            str(source), budget="10MB", device="cpu", rate=0.25, precision="source", method="conmoe"
        )
    found = re.search(r"--gpu (\S+)", error.value.fix)
    assert found is not None
    return found[1]


def test_a_fit_writes_it_and_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    budget = _least(source)
    _fit(source, tmp_path / "whole", budget=budget)

    def stop(step: Any) -> None:
        if step.stage == "calibrate" and step.step == 2:
            raise Stop

    with pytest.raises(Stop):
        _fit(source, tmp_path / "again", budget=budget, progress=stop)
    _fit(source, tmp_path / "again", budget=budget)
    whole, again = (
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / one).iterdir()}
        for one in ("whole", "again")
    )
    assert PREDICTOR_FILE in whole and whole == again
    manifest = load_manifest(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / PREDICTOR_FILE)
    assert sorted(tensors) == ["predictor.1", "predictor.2"]
    assert manifest.prefetch is not None and sorted(manifest.prefetch.recall) == [1, 2]
    assert manifest.prefetch.resident_share < 1


def test_a_package_that_will_be_all_resident_has_none(source: Path, tmp_path: Path) -> None:
    _fit(source, tmp_path / "out", budget="4GB")
    assert not (tmp_path / "out" / PREDICTOR_FILE).exists()
    assert load_manifest(tmp_path / "out").prefetch is None
