"""Tiny random models that take pictures (and sound) beside text, of the classes that transformers has for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from families import _BASE, BY_NAME, VOCAB

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _text(kind: str, **extra: Any) -> dict[str, Any]:
    found = {
        **_BASE,
        **(BY_NAME[kind].extra if kind in BY_NAME else {}),
        "model_type": kind,
        **extra,
    }
    return {name: value for name, value in found.items() if value is not None}


MODELS: Mapping[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "text_config": _text("qwen3_vl_moe_text", rope_parameters=_MROPE, num_hidden_layers=3),
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
        **_IDS,
    },
    "glm4v_moe": {
        "text_config": _text(
            "glm4v_moe_text",
            rope_parameters={**_MROPE, "partial_rotary_factor": 1.0},
            first_k_dense_replace=1,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
        ),
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "image_size": 16,
            "patch_size": 4,
        },
        "image_token_id": 90,
        "video_token_id": 91,
    },
    "ernie4_5_vl_moe": {
        "text_config": _text(
            "ernie4_5_vl_moe_text",
            moe_num_experts=8,
            moe_k=3,
            moe_num_shared_experts=1,
            moe_intermediate_size=[16, 8],
            mlp_layer_types=["dense", "sparse", "sparse"],
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        ),
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
        },
    },
    "qwen3_5_moe": {
        "text_config": _text(
            "qwen3_5_moe_text", rope_parameters={**_MROPE, "partial_rotary_factor": 1.0}
        ),
        "vision_config": _QWEN_VISION,
        **_IDS,
    },
    "kimi_k25": {
        "text_config": _text(
            "deepseek_v3",
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            num_key_value_heads=4,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            head_dim=None,
        ),
        "vision_config": {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "projection_hidden_size": 32,
        },
        "image_token_id": 90,
    },
    "aria": {
        "text_config": _text("aria_text", moe_num_experts=8, moe_topk=3, moe_num_shared_experts=1),
        "vision_config": _SIGLIP,
        "image_token_index": 90,
        "projector_patch_to_query_dict": {4: 2},
    },
    "internvl": {
        "text_config": _text("qwen3_moe"),
        "vision_config": {**_SIGLIP, "image_size": [16, 16], "patch_size": [8, 8]},
        "image_token_id": 90,
    },
    "llava": {
        "text_config": _text("mixtral"),
        "vision_config": {**_SIGLIP, "model_type": "siglip_vision_model"},
        "image_token_index": 90,
    },
    "qwen3_omni_moe_thinker": {
        "text_config": _text("qwen3_omni_moe_text", rope_parameters=_MROPE),
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
        "audio_config": {
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "output_dim": 32,
        },
        "image_token_id": 90,
        "video_token_id": 91,
        "audio_token_id": 94,
        "vision_start_token_id": 92,
    },
    "minimax_m3_vl": {
        "text_config": _text("minimax_m3_vl_text"),
        "vision_config": {**_SIGLIP},
    },
    "gemma4": {
        "text_config": _text(
            "gemma4_text",
            enable_moe_block=True,
            top_k_experts=3,
            sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=VOCAB,
            global_head_dim=8,
            num_kv_shared_layers=0,
        ),
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "position_embedding_size": 64,
        },
        "audio_config": None,
    },
}


def tiny_multimodal_config(kind: str, vision: Mapping[str, Any] | None = None, **text: Any) -> Any:
    """The config of a tiny instance; ``text`` replaces values of its text model, ``vision`` of the other part."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = {**MODELS[kind], "text_config": {**MODELS[kind]["text_config"], **text}}
    if vision:
        settings["vision_config"] = {**settings["vision_config"], **vision}
    return CONFIG_MAPPING[kind](**settings)


def tiny_multimodal(
    kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **text: Any
) -> Any:
    """A random model of transformers' class for the whole of it, weights spread enough for routing to matter."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    config = tiny_multimodal_config(kind, **text)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.08 if "embed" not in name else 0.5, generator=generator)
            elif not any(word in name for word in ("norm", "A_log", "dt_bias", "scale", "scalar")):
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.to(dtype).eval()


def save_tiny_multimodal(kind: str, folder: Path, seed: int = 0, **text: Any) -> Any:
    """Write one as transformers writes it; the model itself."""
    model = tiny_multimodal(kind, seed, **text)
    model.save_pretrained(folder)
    return model
