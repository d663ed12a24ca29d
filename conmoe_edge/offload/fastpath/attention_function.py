"""Attention of one new token on a CPU.

Attention is transformers' and torch's business, with one exception: for one new token torch's fused function reads
bf16 at a fraction of the memory's speed, on processors with bf16 instructions too (1.3 ms a layer for 512 cached
tokens of OLMoE, whose bytes take 0.15 ms): a good part of a token's time. Its two products are weights (the cached keys
and values) times one row, which is what the operator is for (``offload/kernels/cpu``). Masks other than none, prompts,
batches, sinks and whatever else a model asks for stay with transformers.

``suit_attention`` looks at the processor and the model's format, never at a stopwatch. Memory: the scores of one
token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conmoe_edge.model.attention_in_place import FUSED, attend_through
from conmoe_edge.model.checked_attention import checked_attention
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.kernels.cpu.bindings import operator

SUITED = "conmoe_sdpa"
_EXTRAS = ("softcap", "s_aux", "position_bias", "cache")


def suit_attention(model: PreTrainedModel, machine: Machine) -> bool:
    """Let ``model`` attend through ``one_token_attention``; whether it will."""
    slow = machine.device == "cpu" and model.dtype == torch.bfloat16
    if not slow or operator() is None:
        return False
    return attend_through(model, SUITED, one_token_attention, FUSED)


def one_token_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function: [B, heads, T, D] ... -> ([B, T, heads, D'], none)."""
    engine = operator()
    single = query.shape[0] == query.shape[2] == 1 and attention_mask is None
    plain = single and not any(kwargs.get(name) is not None for name in _EXTRAS)
    bf16 = query.dtype == key.dtype == value.dtype == torch.bfloat16
    if plain and bf16 and engine is not None:
        factor = query.shape[3] ** -0.5 if scaling is None else scaling
        out = engine.attend(query, key, value, factor)
        if out is not None:
            return out, None
    return checked_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
