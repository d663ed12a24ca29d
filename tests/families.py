"""Tiny random instances of every architecture family that the test matrix covers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCAB = 96

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MLA = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "head_dim": None,
}
_SPARSE = {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}


@dataclass(frozen=True)
class Family:
    """A model type and what its config needs beyond the common base (``None`` drops a base key)."""

    model_type: str
    extra: dict[str, Any]


FAMILIES = (
    Family(
        "afmoe",
        {
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "global_attn_every_n_layers": 2,
            "sliding_window": 8,
        },
    ),
    Family("deepseek_v2", {**_MLA, "topk_method": "greedy", "n_group": 1}),
    Family("deepseek_v3", {**_MLA, "q_lora_rank": 16}),
    Family("dots1", {**_SPARSE, "n_group": 1}),
    Family(
        "ernie4_5_moe",
        {"moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    Family("exaone_moe", {**_SPARSE, "sliding_window": 8, "num_shared_experts": 1}),
    Family("flex_olmo", {}),
    Family("glm4_moe", {**_SPARSE}),
    Family("gpt_oss", {"sliding_window": 8}),
    Family("granitemoe", {}),
    Family("granitemoeshared", {"shared_intermediate_size": 24}),
    Family("hunyuan_v1_moe", {"moe_topk": 3, "num_shared_expert": 1}),
    Family("lfm2_moe", {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}),
    Family("mimo_v2_flash", {"sliding_window": 8}),
    Family(
        "minimax",
        {
            "block_size": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    Family("minimax_m2", {}),
    Family("mixtral", {}),
    Family("olmoe", {}),
    Family("phimoe", {}),
    Family("qwen2_moe", {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}),
    Family(
        "qwen3_5_moe_text",
        {
            "shared_expert_intermediate_size": 24,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    Family("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    Family(
        "qwen3_next",
        {
            "shared_expert_intermediate_size": 24,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    Family("solar_open", {**_SPARSE}),
    Family("deepseek", {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}),
)
BY_NAME = {family.model_type: family for family in FAMILIES}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The config of a family's tiny instance."""
    from transformers import AutoConfig

    if model_type == "deepseek":
        from conmoe_edge.model import deepseek

        deepseek.register_config()
        deepseek.register_model()
    settings = {**_BASE, **BY_NAME[model_type].extra, **overrides}
    settings = {
        key: value for key, value in settings.items() if value is not None or key == "q_lora_rank"
    }
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(
    model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    """A random model of the family, weights spread enough for routing to matter, in eval mode."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.08 if "embed" not in name else 0.5, generator=generator)
            elif "norm" not in name and "A_log" not in name and "dt_bias" not in name:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.to(dtype).eval()


def save_tiny(
    model_type: str,
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """A tiny model written as transformers writes it (per-expert or fused names, as the family has them on the hub)."""
    model = tiny_model(model_type, seed, dtype, **overrides)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters over the tiny vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 33 + VOCAB - 5)]
    words = ["<pad>", "<s>", "</s>", "<unk>", "▁", *letters]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Metaspace()])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def materialise(model: Any, slots: Any) -> Any:
    """Fill every router slot of a plain model with the weights of its prototype, scaled as its record says."""
    from conmoe_edge.model.experts import find_experts, part_names

    experts = find_experts(model)
    before = {
        layer: {name: getattr(module, name).detach().clone() for name in part_names(module)}
        for layer, (_, module) in experts.items()
    }
    with torch.no_grad():
        for layer, (_, module) in experts.items():
            for slot, record in enumerate(slots[layer]):
                for name in part_names(module):
                    source = before[record.prototype.layer][name][record.prototype.expert]
                    getattr(module, name)[slot] = source
    return model
