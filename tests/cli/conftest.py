"""A tiny random model that can be talked to, a text, and a package made from both by the real ``fit``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from conmoe_edge.cli.main import main

_DEMO = Path(__file__).resolve().parents[2] / "conmoe_edge" / "data" / "demo"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE of four layers with the tokenizer and the chat template of the demo model."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(_DEMO / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short calibration text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The lighthouse stood on a rock in the sea. " * 400, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def package(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of its experts are gone, and all that is left is resident."""
    out = tmp_path_factory.mktemp("packages") / "out"
    words = ("--gpu", "900MB", "--device", "cpu", "--rate", "50%", "--method", "conmoe")
    calibration = ("--calibration", str(text), "--calibration-tokens", "512")
    result = CliRunner().invoke(
        main, ["fit", str(model), "--out", str(out), *words, *calibration, "--offline", "--quiet"]
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return out
