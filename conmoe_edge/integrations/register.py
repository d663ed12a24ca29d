"""Make transformers know packages, without importing transformers.

``import conmoe_edge`` calls ``watch_transformers``. Whether transformers was imported before or is imported later, its
registries then have the quantizer ``conmoe``, the DeepSeek V1 classes and the classes of text models that take
pictures too, once. This file imports no torch.
"""

from __future__ import annotations

import sys
from types import ModuleType

import wrapt

QUANT_METHOD = "conmoe"


def watch_transformers() -> None:
    """Register as soon as transformers' registries exist."""
    wrapt.register_post_import_hook(_register_quantizer, "transformers.quantizers.auto")
    wrapt.register_post_import_hook(
        _register_deepseek, "transformers.models.auto.configuration_auto"
    )
    wrapt.register_post_import_hook(_register_deepseek, "transformers.models.auto.modeling_auto")
    wrapt.register_post_import_hook(_register_text_parts, "transformers.models.auto.modeling_auto")


def _register_quantizer(auto: ModuleType) -> None:
    # This runs while transformers is still being imported: the quantizer's own file may import only
    # its base classes.
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    from conmoe_edge.integrations.quantizer import ConmoeConfig, ConmoeQuantizer

    auto.register_quantization_config(QUANT_METHOD)(ConmoeConfig)
    auto.register_quantizer(QUANT_METHOD)(ConmoeQuantizer)


def _register_text_parts(auto: ModuleType) -> None:
    from conmoe_edge.model.auto_names import register_text_parts

    register_text_parts(auto)


def _register_deepseek(auto: ModuleType) -> None:
    """The config class; it registers its model itself, with the first config that is made.

    A config's file needs both auto modules whole. Where one is in the middle of its import, the
    work is left to the call that comes when that import is over.
    """
    models = sys.modules.get("transformers.models.auto.modeling_auto")
    if models is not None and not hasattr(models, "AutoModelForCausalLM"):
        return
    from conmoe_edge.model import deepseek

    if hasattr(deepseek, "register_config"):  # missing while ``deepseek`` itself is being imported
        deepseek.register_config()
