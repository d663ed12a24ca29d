"""A function of our own in the place of one of transformers' attention functions, behind the same mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

FUSED, EAGER = "sdpa", "eager"
_MASKS = {FUSED: sdpa_mask, EAGER: eager_mask}


def attend_through(
    model: PreTrainedModel, name: str, function: Callable[..., Any], instead_of: str
) -> bool:
    """Register ``function`` as ``name`` and let ``model`` attend through it where it would through ``instead_of``;
    whether it will.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != instead_of:
        return False
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _MASKS[instead_of])
    model.set_attn_implementation(name)
    return config._attn_implementation == name
