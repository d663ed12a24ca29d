"""AutoGPTQ writes a bias beside every packed weight: zeros where the layer has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packed_kinds import WEIGHT, digest, opened, reference_of, source_of
from safetensors.torch import load_file, save_file

from conmoe_edge.errors import CheckpointError

KIND = "gptq-w4-desc-asym"
BIAS = WEIGHT.replace("weight", "bias")


def with_biases(folder: Path, attention: bool = False) -> tuple[Path, dict[str, torch.Tensor]]:
    """Zeros beside every packed weight; in the attention numbers, and a model that has them, if asked for."""
    source = source_of(KIND, folder)
    tensors = load_file(source / "model.safetensors")
    biases = {}
    for name in [one for one in tensors if one.endswith(".scales")]:
        size = tensors[name].shape[1]
        real = attention and ".self_attn." in name
        bias = torch.randn(size, dtype=torch.float16) if real else torch.zeros(size).half()
        biases[name.replace("scales", "bias")] = bias
    save_file({**tensors, **biases}, source / "model.safetensors", {"format": "pt"})
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_bias": attention}))
    return source, biases


@pytest.mark.parametrize("attention", [False, True])
def test_zeros_without_a_place_are_left_out(attention: bool, tmp_path: Path) -> None:
    source, biases = with_biases(tmp_path / "source", attention)
    with opened(source).tensors() as read:
        left = {name for name in biases if name in read}
        assert left == {name for name in biases if attention and ".self_attn." in name}
        assert all(torch.equal(read[name][...], biases[name]) for name in left)
        assert digest(read[WEIGHT][...]) == reference_of(KIND)[WEIGHT]


def test_numbers_without_a_place_are_refused(tmp_path: Path) -> None:
    source, _ = with_biases(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[BIAS][3] = 0.01
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with opened(source).tensors() as read, pytest.raises(CheckpointError, match=BIAS):
        read[WEIGHT][...]
