"""Bounds on the numbers of a config: the largest of a published one passes, and what would build too much does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from conmoe_edge.errors import CheckpointError
from conmoe_edge.model.size_bounds import SizeBounds

# 30 layers, a vocabulary of 262,144: the sizes of gemma-4-26B-A4B.
BOUNDS = SizeBounds.of(
    {
        "model.language_model.embed_tokens.weight": (262144, 2816),
        "model.language_model.layers.29.input_layernorm.weight": (2816,),
    }
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size_per_layer_input", 262144),  # a vocabulary, not a count of layers
        ("num_hidden_layers", 30),
        ("time_step_limit", [0.0, math.inf]),
        ("time_step_limit", [0.0, 1e308]),  # as Nemotron-3-Ultra writes that there is none
        ("max_window_layers", 1 << 20),
    ],
)
def test_published_numbers_pass(field: str, value: Any) -> None:
    BOUNDS.check(Path("config.json"), {"text_config": {field: value}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 4096),
        ("encoder_layers", 1 << 20),
        ("n_layer", 4096),
        ("layers_of_experts", 1 << 22),
        ("num_experts", 1 << 30),
        ("time_step_limit", 1 << 63),
        ("rope_theta", 1e30),
    ],
)
def test_numbers_beyond_the_weights_are_refused(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=field):
        BOUNDS.check(Path("config.json"), {"text_config": {field: value}})
