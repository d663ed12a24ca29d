"""Qwen3-MoE: gates are renormalised over the chosen experts, keys and queries are normalised head by head."""

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
    not_computed,
    require,
    stacked_experts,
)


def _check(config: Any) -> None:
    require(
        config,
        {
            "hidden_act": ("silu",),
            "norm_topk_prob": (True,),
            "attention_bias": (False,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": (None, []),
        },
    )
    if getattr(config, "use_sliding_window", False) and config.sliding_window is not None:
        raise not_computed(config, "sliding_window", config.sliding_window)
    check_rope(config)


def _add_fields(writer: gguf.GGUFWriter, config: Any) -> list[str]:
    add_sizes(writer, config, head=config.head_dim)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    return add_rope(writer, config)


def _reshaped(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    return stacked_experts(tensors)


QWEN3_MOE = Architecture(gguf.MODEL_ARCH.QWEN3MOE, _check, _add_fields, _reshaped)
