"""Attention that transformers has not fused, some queries at a time.

Where a class adds something to its scores that torch's fused attention has no place for (gpt-oss: a sink for every
head), transformers computes all of them: of T tokens behind N others heads * T * (T + N) numbers, and twice that for
what the softmax makes of them. For a chunk of a prompt that is more than all else that the layer holds. Here the
class's own function gets ``QUERIES`` tokens at a time, counted from the first of the forward. What a token gives
depends on its own row of scores alone.

Memory: three times the scores of ``QUERIES`` tokens, in the model's format (``plan/needs.py`` counts them).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conmoe_edge.model.attention_in_place import EAGER, attend_through

BLOCKED = "conmoe_blocked_eager"
QUERIES = 64
_MODULE = "transformers.models.gpt_oss.modeling_gpt_oss"
"""Of classes whose function is known to take queries and their rows of the mask, and nothing else that has as many."""


def blocked(kind: type[PreTrainedModel]) -> bool:
    """Whether models of this class attend so."""
    return kind.__module__ == _MODULE


def attend_in_blocks(model: PreTrainedModel) -> bool:
    """Let ``model`` attend through ``blocked_attention`` where that is made for it; whether it will."""
    return blocked(type(model)) and attend_through(model, BLOCKED, blocked_attention, EAGER)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface of an attention function: [B, heads, T, D] ... -> ([B, T, heads, D'], none); the weights
    too where all tokens are one block.
    """
    whole = importlib.import_module(_MODULE).eager_attention_forward
    tokens = query.shape[2]
    if tokens <= QUERIES:
        return whole(module, query, key, value, attention_mask, **kwargs)
    parts = []
    for start in range(0, tokens, QUERIES):
        span = slice(start, start + QUERIES)
        mask = None if attention_mask is None else attention_mask[:, :, span]
        parts.append(whole(module, query[:, :, span], key, value, mask, **kwargs)[0])
    return torch.cat(parts, dim=1), None
