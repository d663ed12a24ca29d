"""A plan of a model with tens of thousands of tensors takes seconds, most of them transformers' own."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

from conmoe_edge import api

LAYERS, EXPERTS = 94, 128
HIDDEN, WIDTH, VOCAB = 64, 32, 128
BOUND = 30.0
"""CPU seconds: 3 on an idle machine; ten times of it are neither a busy one nor an unlucky one."""


def sizes() -> dict[str, tuple[int, ...]]:
    """The tensors of a Qwen3-MoE with the layers and experts of the largest, in FP8 with a scale for each block."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found |= {f"{at}{one}_layernorm.weight": (HIDDEN,) for one in ("input", "post_attention")}
        found |= {f"{at}self_attn.{one}_norm.weight": (16,) for one in "qk"}
        found |= {f"{at}self_attn.{one}_proj.weight": (64, HIDDEN) for one in "qo"}
        found |= {f"{at}self_attn.{one}_proj.weight": (32, HIDDEN) for one in "kv"}
        found[f"{at}mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, shape in (
                ("gate", (WIDTH, HIDDEN)),
                ("up", (WIDTH, HIDDEN)),
                ("down", (HIDDEN, WIDTH)),
            ):
                found[f"{at}mlp.experts.{expert}.{name}_proj.weight"] = shape
    return found


def write(folder: Path) -> int:
    """Headers with no numbers behind them; how many tensors there are."""
    header: dict[str, object] = {}
    end = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], width: int) -> None:
        nonlocal end
        start = end
        for size in shape:
            width *= size
        end += width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}

    for name, shape in sizes().items():
        if ".experts." in name:
            add(name, "F8_E4M3", shape, 1)
            add(f"{name}_scale_inv", "F32", (1, 1), 4)
        else:
            add(name, "BF16", shape, 2)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return len(header)


def test_a_plan_of_73_000_tensors(tmp_path: Path) -> None:
    assert write(tmp_path) == 73_041
    started = time.process_time()
    report = api.plan(str(tmp_path), budget="4GB", device="cpu")
    assert time.process_time() - started < BOUND
    assert report.anatomy.expert_count == LAYERS * EXPERTS
