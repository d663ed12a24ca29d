"""GGUF files: llama.cpp loads them and computes what this runtime computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_tiny
from llama import ask, needs_llama
from small_tokenizers import make

import conmoe_edge
from conmoe_edge.export.gguf import export_gguf

PROMPT = [5, 9, 33, 12, 60, 61, 7, 8, 20]
FAMILIES = ("olmoe", "qwen3_moe", "gpt_oss")
WIDTHS = {"qwen3_moe": "moe_intermediate_size"}


def source(family: str, folder: Path, **settings: Any) -> Path:
    """A tiny model with a real tokenizer, whose sizes llama.cpp's operators take."""
    width = WIDTHS.get(family, "intermediate_size")
    sizes = {"vocab_size": 512, "num_key_value_heads": 4, width: 64, "mlp_only_layers": None}
    if family == "gpt_oss":
        sizes["num_hidden_layers"] = 4
    path = save_tiny(family, folder, **{**sizes, **settings})
    make("byte-bpe").save_pretrained(path)
    return path


def fitted(family: str, folder: Path, rate: float, **settings: Any) -> Path:
    path = source(family, folder / "source", **settings)
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    conmoe_edge.fit(
        str(path),
        folder / "package",
        budget="4GB",
        device="cpu",
        rate=rate,
        engine="gguf",
        calibration=text,
        calibration_tokens=512,
    )
    return folder / "package"


def greedy(package: Path, steps: int) -> tuple[list[int], np.ndarray]:
    """What this runtime says: the tokens, and the logits of every position."""
    model = conmoe_edge.load(package, device="cpu")
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(steps):
            logits = model(torch.tensor([tokens])).logits[0]
            tokens.append(int(logits[-1].argmax()))
    return tokens[len(PROMPT) :], logits.float().numpy()


@needs_llama
@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_gives_the_same_greedy_tokens(family: str, rate: float, tmp_path: Path) -> None:
    package = fitted(family, tmp_path, rate)
    done = export_gguf(package, tmp_path / "out.gguf", outtype="f32")
    assert done.width == (64 if rate == 0 else 32)
    wanted, logits = greedy(package, 48)
    found = ask(tmp_path / "out.gguf", prompt=PROMPT, steps=48)
    assert found["tokens"] == wanted
    np.testing.assert_allclose(found["logits"], logits, atol=1e-3 * np.abs(logits).max())
