"""The refusal of what transformers knows, but has no causal language model for, or none that can be consolidated."""

from __future__ import annotations

from transformers import PretrainedConfig

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.config_json import ANOTHER_MODEL

_TEXT_MODELS = {
    "qwen3_omni_moe": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "ernie4_5_vl_moe": "baidu/ERNIE-4.5-21B-A3B-PT",
}
"""A text model of the same family and a like size, which is consolidated."""
_OTHER_SENSES = ("vision_config", "audio_config", "thinker_config")


def no_causal_lm(config: PretrainedConfig) -> UnsupportedModel:
    """The error for a config whose class transformers has no causal language model for."""
    kind = config.model_type
    if any(hasattr(config, name) for name in _OTHER_SENSES):
        why = (
            "it takes pictures, video or sound, and transformers has no class for it that continues text by one "
            "token after the other"
        )
    else:
        why = "transformers knows it as another kind of model"
    return UnsupportedModel(
        f"{kind} cannot be consolidated: transformers has no causal language model for it.",
        why,
        another_model(config),
    )


def another_model(config: PretrainedConfig) -> str:
    """The fix line of a refusal: a text model of the family, where one is known."""
    known = _TEXT_MODELS.get(config.model_type)
    if known is None:
        return ANOTHER_MODEL
    return f"take a text model of the family: conmoe-edge plan {known}"
