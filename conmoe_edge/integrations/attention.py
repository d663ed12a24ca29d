"""Which of transformers' attention functions a forward takes on a processor without bf16 instructions.

torch's fused attention multiplies bf16 row by row there: for one new token over 600 cached ones transformers' plain
function ("eager") takes a third of its time. For many rows the plain function would hold all scores at once, so
prefill keeps the fused one. The choice looks at the processor, the model's format and the number of tokens, never at
a stopwatch.

Heads that share keys and values are left to the fused function: the plain one copies the cache for each of them.
Memory: nothing. Raises nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from conmoe_edge.offload.arithmetic import Machine

FUSED, PLAIN = "sdpa", "eager"


def suit_attention(model: PreTrainedModel, machine: Machine) -> bool:
    """Let ``model`` change between the two by itself; whether it will."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    shared = heads is None or getattr(config, "num_key_value_heads", heads) != heads
    slow = machine.device == "cpu" and not machine.native_bf16 and model.dtype == torch.bfloat16
    if not slow or shared or config._attn_implementation != FUSED:
        return False
    model.register_forward_pre_hook(_choose, with_kwargs=True)
    return True


def _choose(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert isinstance(model, PreTrainedModel)
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    wanted = PLAIN if tokens is not None and tokens.shape[1] == 1 else FUSED
    if model.config.get_text_config()._attn_implementation != wanted:
        model.set_attn_implementation(wanted)
