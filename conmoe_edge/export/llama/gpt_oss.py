"""gpt-oss: a clamped gate, biases everywhere, attention sinks, every other layer with a window.

llama.cpp has the clamp (7), the slope of the gate (1.702) and the turns of the windows in its code.
"""

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
    with_head,
)

_WINDOWS = ("sliding_attention", "full_attention")
_GATE_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


def _check(config: Any) -> None:
    require(
        config,
        {
            "hidden_act": ("silu",),
            "swiglu_limit": (None, 7.0),
            "attention_bias": (None, True),
        },
    )
    kinds = list(config.layer_types)
    if kinds != [_WINDOWS[layer % 2] for layer in range(config.num_hidden_layers)]:
        raise not_computed(config, "layer_types", kinds)
    check_rope(config)


def _add_fields(writer: gguf.GGUFWriter, config: Any) -> list[str]:
    add_sizes(writer, config, head=config.head_dim)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_count(config.num_local_experts)
    writer.add_sliding_window(config.sliding_window)
    return add_rope(writer, config)


def _reshaped(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Experts are stored [E, in, out] with gate and up in turns."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, _ = name.rpartition(".")
        if name.endswith(_GATE_UP):
            found[f"{prefix}.gate_proj.weight"] = tensor[..., 0::2].transpose(1, 2)
            found[f"{prefix}.up_proj.weight"] = tensor[..., 1::2].transpose(1, 2)
        elif name.endswith(_GATE_UP + "_bias"):
            found[f"{prefix}.gate_proj.bias"] = tensor[..., 0::2]
            found[f"{prefix}.up_proj.bias"] = tensor[..., 1::2]
        elif name.endswith(_DOWN):
            found[f"{prefix}.down_proj.weight"] = tensor.transpose(1, 2)
        elif name.endswith(_DOWN + "_bias"):
            found[f"{prefix}.down_proj.bias"] = tensor
        elif name.endswith(".self_attn.sinks"):
            found[f"{name}.weight"] = tensor
        else:
            found[name] = tensor
    return with_head(found)


GPT_OSS = Architecture(gguf.MODEL_ARCH.GPT_OSS, _check, _add_fields, _reshaped)
