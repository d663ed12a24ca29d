"""Tiny checkpoints of whole numbers, packed by their own libraries (``tools/make_quantised_fixtures.py``)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from families import save_tokenizer

from conmoe_edge.checkpoint.sources.locate import locate
from conmoe_edge.model.opened import OpenedModel, open_model

DATA = Path(__file__).resolve().parent / "data" / "quantised"
KINDS = {
    "ct-w4-group": "packed-int",
    "ct-w4-group-asym": "packed-int",
    "ct-w4-actorder": "packed-int",
    "ct-w8-channel-asym": "packed-int",
    "ct-w3-tensor-asym": "packed-int",
    "ct-int8-channel": "int8",
    "ct-int8-tensor-asym": "int8",
    "gptq-w4": "gptq",
    "gptq-w2-v2-asym": "gptq",
    "gptq-w3-asym": "gptq",
    "gptq-w4-v1-asym": "gptq",
    "gptq-w8-v2-desc": "gptq",
    "gptq-w4-desc-asym": "gptq",
    "awq-gemm": "awq",
    "awq-gemv": "awq",
    "auto-round-gptq": "gptq",
    "auto-round-own": "gptq",
    "auto-round-awq": "awq",
}
"""Folder -> the form that its weights are read as."""
WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"
"""One of the weights that all of them have in that form: [32, 64]."""


def source_of(kind: str, folder: Path) -> Path:
    """A copy with a tokenizer, and without what its weights expand to."""
    shutil.copytree(DATA / kind, folder, ignore=shutil.ignore_patterns("reference.json"))
    save_tokenizer(folder)
    return folder


def opened(folder: Path) -> OpenedModel:
    """The model, no weight of it read."""
    return open_model(locate(str(folder)))


def reference_of(kind: str) -> dict[str, str]:
    """Name of each packed weight -> digest of what its library expands it to."""
    return json.loads((DATA / kind / "reference.json").read_text())


def digest(weight: torch.Tensor) -> str:
    """As the tool writes it: format, shape, SHA-256 of the numbers as they lie in memory."""
    data = weight.contiguous().view(torch.uint8).numpy().tobytes()
    shape = "x".join(map(str, weight.shape))
    return f"{str(weight.dtype).removeprefix('torch.')} {shape} {hashlib.sha256(data).hexdigest()}"
