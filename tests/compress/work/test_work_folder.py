"""The work folder: what is kept comes back, and goes with its scope."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.work.work_folder import WorkFolder, save_tensors
from conmoe_edge.errors import CheckpointError


def test_a_decided_scope_leaves_its_constants_and_other_scopes_alone(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    for layer in (3, 4, 5):
        for file in (work.experts, work.sample, work.tokens, work.vectors, work.constants):
            save_tensors(file(layer), {"one": torch.ones(1)})
    work.drop_scope((3, 4))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(
        [work.constants(layer).name for layer in (3, 4)]
        + [file(5).name for file in (work.experts, work.sample, work.tokens, work.vectors)]
        + [work.constants(5).name]
    )


def test_hidden_states_come_back_as_they_were_and_outlive_their_file(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    states = {"train": torch.randn(2, 3, 4), "held_out": torch.randn(1, 3, 4).bfloat16()}
    work.save_hidden("calibrate", 7, states)
    found = work.load_hidden("calibrate", 7)
    work.drop_hidden("calibrate", 7)
    assert not list(tmp_path.iterdir())
    assert found.keys() == states.keys()
    assert all(torch.equal(found[name], states[name]) for name in states)
    with pytest.raises(CheckpointError, match="damaged"):
        work.load_hidden("calibrate", 7)


def test_tensors_of_another_value_are_refused(tmp_path: Path) -> None:
    path = WorkFolder(tmp_path).tokens(0)
    save_tensors(path, {"hidden": torch.ones(1, 2), "unknown": torch.ones(1)})
    with pytest.raises(CheckpointError, match="damaged"):
        LayerTokens.load(path)
