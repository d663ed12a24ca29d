"""OLMoE: gates are shares of a softmax over all experts, keys and queries are normalised over all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
from torch import Tensor

from conmoe_edge.export.llama.architecture import (
    Architecture,
    add_rope,
    add_sizes,
    check_rope,
    require,
    stacked_experts,
    with_head,
)

_OF_KEYS = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")


def _check(config: Any) -> None:
    require(
        config,
        {
            "hidden_act": ("silu",),
            "norm_topk_prob": (False,),
            "clip_qkv": (None,),
            "attention_bias": (False,),
        },
    )
    check_rope(config)


def _add_fields(writer: gguf.GGUFWriter, config: Any) -> list[str]:
    heads = config.num_attention_heads
    add_sizes(writer, config, head=config.hidden_size // heads)
    writer.add_head_count_kv(heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_count(config.num_experts)
    notes = add_rope(writer, config)
    if _times(config) > 1:
        notes.append(
            f"llama.cpp's OLMoE has as many key and value heads as query heads: the {config.num_key_value_heads} of "
            f"this model are written {_times(config)} times each, which changes no answer."
        )
    return notes


def _reshaped(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    found = stacked_experts(tensors)
    if _times(config) > 1:
        for name, tensor in found.items():
            if name.endswith(_OF_KEYS):
                found[name] = _repeated(tensor, config.num_key_value_heads, _times(config))
    return with_head(found)


def _times(config: Any) -> int:
    return config.num_attention_heads // config.num_key_value_heads


def _repeated(tensor: Tensor, heads: int, times: int) -> Tensor:
    """Each head ``times`` times over; the mean square over all heads, by which keys are normalised, stays."""
    one = tensor.unflatten(0, (heads, -1))
    return one.repeat_interleave(times, dim=0).flatten(0, 1)


OLMOE = Architecture(gguf.MODEL_ARCH.OLMOE, _check, _add_fields, _reshaped)
