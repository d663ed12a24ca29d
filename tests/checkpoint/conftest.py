"""Small checkpoints on disk, made by the format's own library and never by the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Shards = dict[str, dict[str, torch.Tensor]]


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{seed}.weight": torch.randn(6, 8, generator=generator).to(torch.bfloat16),
        f"layers.{seed}.bias": torch.randn(5, generator=generator),
        f"layers.{seed}.steps": torch.randint(0, 9, (3,), generator=generator),
    }


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder with ``model.safetensors`` of three tensors."""
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "olmoe"}')
    save_file(_tensors(0), folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two shards and an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "olmoe"}')
    weight_map: dict[str, str] = {}
    for number in range(2):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(_tensors(number), folder / name)
        weight_map |= dict.fromkeys(_tensors(number), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def raw_file() -> Callable[..., bytes]:
    """Bytes of a safetensors file with any header: ``raw_file(header, data, length=None)``."""

    def build(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    return build
