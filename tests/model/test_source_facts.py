"""What the small files of a model say, in the order in which it helps to hear it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conmoe_edge.checkpoint.quantised.stored import Stored
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.source_facts import read_source


def test_an_unknown_architecture_is_named_before_its_quantisation(tmp_path: Path) -> None:
    """Kimi-K2's own: "take a version in 16 bit" would be refused as well."""
    config = {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = {"model.embed_tokens.weight": Stored("bfloat16", 128, (8, 8))}
    with pytest.raises(UnsupportedModel, match="not known to transformers") as caught:
        read_source(tmp_path, stored)
    assert "kimi_k2" in caught.value.why
