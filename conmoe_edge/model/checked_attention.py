"""torch's fused attention, except that queries and keys that are no numbers give an output that is none.

In torch's kernel for CPUs the greatest score of a row is found with a comparison that NaN does not win where the row
has fewer than sixteen. A row of nothing but NaN then counts as one that is masked as a whole and gives zeros: of a
prompt of up to fifteen tokens whose keys or queries are NaN, every number behind the layer is finite, and wrong. A
value that is NaN shows. Here the queries, and the keys that came with them, are looked at.

That is one sum over each, beside products of every query with every key. Memory: of numbers in 16 bits, a piece of
one sequence's in fp32.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conmoe_edge.model.all_finite import all_finite
from conmoe_edge.model.attention_in_place import FUSED, attend_through
from conmoe_edge.model.blocked_attention import attend_in_blocks

CHECKED = "conmoe_checked_sdpa"


def check_attention(model: PreTrainedModel) -> bool:
    """Let ``model`` attend through ``checked_attention`` where it would through torch's, and some queries at a time
    where that is not fused; whether it will.
    """
    return attend_through(model, CHECKED, checked_attention, FUSED) or attend_in_blocks(model)


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
            if not (all_finite(query[number]) and all_finite(new[number])):
                out[number] = float("nan")
    return out, None
