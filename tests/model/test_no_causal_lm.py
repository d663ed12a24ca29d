"""What transformers knows, but not as a causal language model, is refused by ``plan``, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import save_tiny

from conmoe_edge import api
from conmoe_edge.errors import UnsupportedModel


def _qwen3_vl(folder: Path) -> None:
    """A tiny Qwen3-VL-MoE, vision tower and all, as transformers writes it."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    places = {"image_token_id": 90, "video_token_id": 91}
    places |= {"vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **places)
    Qwen3VLMoeForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)


def test_a_whole_vision_language_model(tmp_path: Path) -> None:
    _qwen3_vl(tmp_path)
    with pytest.raises(UnsupportedModel) as error:
        api.plan(str(tmp_path), budget="4GB")
    assert error.value.what.startswith("qwen3_vl_moe cannot be consolidated")
    assert "text part" in error.value.why
    assert "Qwen/Qwen3-30B-A3B" in error.value.fix


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("qwen3_vl_moe", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("qwen3_vl_moe_text", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("glm4v_moe", "zai-org/GLM-4.5-Air"),
        ("ernie4_5_vl_moe", "baidu/ERNIE-4.5-21B-A3B-PT"),
        ("qwen3_omni_moe", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("qwen3_omni_moe_thinker", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("t5", "ForCausalLM"),
    ],
)
def test_each_is_refused_by_name(kind: str, instead: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from conmoe_edge.model.probe import probe

    with pytest.raises(UnsupportedModel) as error:
        probe(CONFIG_MAPPING[kind]())
    assert error.value.what.startswith(f"{kind} cannot be consolidated")
    assert instead in error.value.fix


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "t5"])
def test_a_type_that_is_not_that_of_the_weights(tmp_path: Path, kind: str) -> None:
    save_tiny("olmoe", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": kind}))
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        api.plan(str(tmp_path), budget="4GB")
