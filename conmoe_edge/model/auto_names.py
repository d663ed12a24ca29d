"""Which models ``AutoModelForCausalLM`` knows. This file imports neither torch nor transformers."""

from __future__ import annotations

from types import ModuleType

TAKES_PICTURES = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
_AUTOREGRESSIVE = ("ForConditionalGeneration", "ForCausalLM")
"""How transformers names classes that predict the next token; its diffusion models have other names."""


def register_text_parts(auto: ModuleType) -> None:
    """Make ``AutoModelForCausalLM`` know the models whose only class takes pictures or sound too, as transformers
    itself does it for Gemma. Imports no model code; calling it again does nothing.

    Args:
        auto: ``transformers.models.auto.modeling_auto``.
    """
    for kind, name in getattr(auto, TAKES_PICTURES).items():
        if isinstance(name, str) and name.endswith(_AUTOREGRESSIVE):
            auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(kind, name)
