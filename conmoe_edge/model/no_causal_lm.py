"""The refusal of what transformers knows, but not as a causal language model.

Most of these take pictures or sound beside text. Their text part has no class with an output head in transformers, so
there is nothing to consolidate that a package could be loaded as.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from conmoe_edge.errors import UnsupportedModel

_TEXT_MODELS = {
    "qwen3_vl_moe": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "qwen3_omni_moe": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "glm4v_moe": "zai-org/GLM-4.5-Air",
    "ernie4_5_vl_moe": "baidu/ERNIE-4.5-21B-A3B-PT",
}
"""A text model of the same family and a like size, which is consolidated."""
_OTHER_SENSES = ("vision_config", "audio_config", "thinker_config")


def no_causal_lm(config: PretrainedConfig) -> UnsupportedModel:
    """The error for a config whose class transformers has no causal language model for."""
    kind = config.model_type
    known = next((text for family, text in _TEXT_MODELS.items() if kind.startswith(family)), None)
    if known or any(hasattr(config, name) for name in _OTHER_SENSES):
        why = (
            "it belongs to a model that takes pictures, video or sound, and transformers has no causal language model "
            "class for the text part alone, which is what a package would hold"
        )
    else:
        why = "transformers knows it as another kind of model"
    return UnsupportedModel(
        f"{kind} cannot be consolidated: transformers has no causal language model for it.",
        why,
        f"take a text model of the family: conmoe-edge plan {known}"
        if known
        else "take a model that transformers has a ...ForCausalLM class for",
    )
