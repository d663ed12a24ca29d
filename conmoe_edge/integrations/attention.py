"""transformers' fused attention on a processor without bf16 instructions: computed in fp32.

torch's fused attention multiplies bf16 at a fraction of the speed of fp32 there. ``suit_attention`` lets such a model
run the same function on queries, keys and values that are widened first: for one new token over 600 cached ones of
OLMoE's shape that takes half of the time, conversion included. Whether it does looks at the processor and the model's
format, never at a stopwatch.

Memory: the keys and values of one layer in fp32, in one buffer that all layers use and that grows with the
conversation; the plan's workspace has it. Raises nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from conmoe_edge.offload.arithmetic import Machine

FUSED, WIDENED = "sdpa", "conmoe_sdpa"
_BUFFER = "_conmoe_attention"
_STEP = 256  # tokens that the buffer grows by, as the cache does


class Buffer:
    """Room for one layer's keys and values in fp32; allocated anew only when a conversation outgrows it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def widen(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Both in fp32; what the buffer held before is gone."""
        needed = key.numel() + value.numel()
        if self._memory.numel() < needed:
            ahead = (key[:, :, :1].numel() + value[:, :, :1].numel()) * _STEP
            with torch.inference_mode(False):  # written to again later, in whatever mode that is
                self._memory = torch.empty(0)  # never two
                self._memory = torch.empty(needed + ahead)
        first = self._memory[: key.numel()].view(key.shape)
        second = self._memory[key.numel() : needed].view(value.shape)
        return first.copy_(key), second.copy_(value)


def suit_attention(model: PreTrainedModel, machine: Machine) -> bool:
    """Let ``model`` compute its attention in fp32 where that is faster; whether it will."""
    slow = machine.device == "cpu" and not machine.native_bf16 and model.dtype == torch.bfloat16
    if not slow or model.config.get_text_config()._attn_implementation != FUSED:
        return False
    AttentionInterface.register(WIDENED, _widened_attention)
    AttentionMaskInterface.register(WIDENED, sdpa_mask)
    buffer = Buffer()
    for module in model.modules():
        if hasattr(module, "is_causal"):  # what transformers' attention functions look at
            setattr(module, _BUFFER, buffer)
    model.set_attn_implementation(WIDENED)
    return model.config.get_text_config()._attn_implementation == WIDENED


def _widened_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    buffer: Buffer | None = getattr(module, _BUFFER, None)
    if buffer is None or query.dtype != torch.bfloat16:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    wide_key, wide_value = buffer.widen(key, value)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    out, _ = sdpa_attention_forward(
        module, query.float(), wide_key, wide_value, attention_mask, **kwargs
    )
    return out.to(query.dtype), None
