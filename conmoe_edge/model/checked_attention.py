"""torch's fused attention, except that queries and keys that are no numbers give an output that is none.

In torch's kernel for CPUs the greatest score of a row is found with a comparison that NaN does not win where the row
has fewer than sixteen. A row of nothing but NaN then counts as one that is masked as a whole and gives zeros: of a
prompt of up to fifteen tokens whose keys or queries are NaN, every number behind the layer is finite, and wrong. A
value that is NaN shows. Here the queries, and the keys that came with them, are looked at.

That is one sum over each, beside products of every query with every key. Memory: of numbers in 16 bits, one sequence's
in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FUSED, CHECKED = "sdpa", "conmoe_checked_sdpa"


def check_attention(model: PreTrainedModel) -> bool:
    """Let ``model`` attend through ``checked_attention`` where it would through torch's; whether it will."""
    config = model.config.get_text_config()
    if config._attn_implementation != FUSED:
        return False
    AttentionInterface.register(CHECKED, checked_attention)
    AttentionMaskInterface.register(CHECKED, sdpa_mask)
    model.set_attn_implementation(CHECKED)
    return config._attn_implementation == CHECKED


def checked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function: [B, heads, T, D] ... -> ([B, T, heads, D'], none)."""
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.device.type == "cpu":
        new = key[:, :, -query.shape[2] :]  # those before were looked at when they came
        for number in range(query.shape[0]):
            if not (_are_numbers(query[number]) and _are_numbers(new[number])):
                out[number] = float("nan")
    return out, None


def _are_numbers(values: Tensor) -> bool:
    """NaN and infinity survive a sum; large numbers may make one of their own."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())
