"""Numbers of a config that no model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny_config

from conmoe_edge.errors import CheckpointError
from conmoe_edge.model.bridge import read_config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("clip_qkv", 1e308),
        ("clip_qkv", 3.4e38),
        ("num_hidden_layers", 10**30),
        ("num_hidden_layers", 1 << 17),
        ("vocab_size", 2**63),
        ("rope_theta", float("-inf")),
    ],
)
def test_it_is_refused_by_name_at_once(tmp_path: Path, name: str, value: Any) -> None:
    config = {**tiny_config("olmoe").to_dict(), name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        read_config(str(tmp_path))
    assert error.value.why.startswith(f"{name} is ")


def test_at_any_depth(tmp_path: Path) -> None:
    config = {**tiny_config("olmoe").to_dict(), "rope_scaling": {"factor": [1.0, float("nan")]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"rope_scaling\.factor is nan") as error:
        read_config(str(tmp_path))
    assert "config.json" in error.value.what


@pytest.mark.parametrize("value", [1e-320, 3.3e38, -1e30])
def test_what_a_format_holds_is_left_to_the_model(tmp_path: Path, value: float) -> None:
    config = {**tiny_config("olmoe").to_dict(), "clip_qkv": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(str(tmp_path)).clip_qkv == value
