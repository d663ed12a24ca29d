"""Models that transformers itself quantises with bitsandbytes: linear layers in few bits, experts as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny

from conmoe_edge.checkpoint.sources.locate import locate
from conmoe_edge.model.opened import open_model


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        (
            "bitsandbytes-4bit",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16",
            },
        ),
        (
            "bitsandbytes-4bit",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_storage": "bfloat16",
                "bnb_4bit_compute_dtype": "bfloat16",
            },
        ),
        ("bitsandbytes-int8", {"load_in_8bit": True}),
    ],
)
def test_read_as_transformers_expands_it(
    form: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Rows of a whole block at least: shorter ones the library itself expands wrongly on AVX-512 (0.50.2).
    wide = {"hidden_size": 64, "num_attention_heads": 4}
    plain = save_tiny("qwen3_moe", tmp_path / "plain", dtype=torch.bfloat16, **wide)
    theirs = AutoModelForCausalLM.from_pretrained(
        plain,
        quantization_config=BitsAndBytesConfig(**settings),
        dtype=torch.bfloat16,
        device_map="cpu",
    )
    theirs.save_pretrained(tmp_path / "model")
    model = open_model(locate(str(tmp_path / "model")))
    assert model.scheme.form == form
    wanted = theirs.dequantize(dtype=torch.bfloat16).state_dict()
    linear = 0
    with model.tensors() as tensors:
        for name in tensors:
            if ".experts." not in name:
                assert torch.equal(tensors[name][...], wanted[name].to(torch.bfloat16)), name
                linear += model.scheme.tensors[name].form == form
    assert linear >= 12
