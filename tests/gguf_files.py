"""GGUF files of tiny random models, laid out as llama.cpp's conversion scripts lay them out.

Written with the ``gguf`` library from what ``save_pretrained`` writes, by names and rules that stand here a second
time, so that a mistake in the package's own tables shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from families import tiny_model
from safetensors.torch import load_file

VOCAB = 320
WORDS = ("th", "the", "Ġthe", "qu", "Ġqu", "ick", "an", "Ġa", "er", "in")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = {
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "mixtral": "llama",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
SIZES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 32, "num_key_value_heads": 4},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"moe_intermediate_size": 32, "mlp_only_layers": [], "head_dim": 16},
    "gpt_oss": {"intermediate_size": 64, "num_hidden_layers": 4},
    "mixtral": {"intermediate_size": 32, "head_dim": None},
    "deepseek_v2": {
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "num_hidden_layers": 3,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        "max_position_embeddings": 163840,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "num_nextn_predict_layers": 0,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
}

_NAMES = {
    r"model\.embed_tokens\.(\w+)": r"token_embd.\1",
    r"model\.norm\.(\w+)": r"output_norm.\1",
    r"lm_head\.(\w+)": r"output.\1",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)": r"blk.\1.attn_\2.\3",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.(\w+)": r"blk.\1.attn_output.\2",
    r"model\.layers\.(\d+)\.self_attn\.([qk])_norm\.(\w+)": r"blk.\1.attn_\2_norm.\3",
    r"model\.layers\.(\d+)\.self_attn\.sinks": r"blk.\1.attn_sinks.weight",
    r"model\.layers\.(\d+)\.self_attn\.kv_a_proj_with_mqa\.(\w+)": r"blk.\1.attn_kv_a_mqa.\2",
    r"model\.layers\.(\d+)\.self_attn\.(kv|q)_a_layernorm\.(\w+)": r"blk.\1.attn_\2_a_norm.\3",
    r"model\.layers\.(\d+)\.self_attn\.(q_[ab])_proj\.(\w+)": r"blk.\1.attn_\2.\3",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(\w+)": r"blk.\1.ffn_\2.\3",
    r"model\.layers\.(\d+)\.mlp\.gate\.e_score_correction_bias": r"blk.\1.exp_probs_b.bias",
    r"model\.layers\.(\d+)\.input_layernorm\.(\w+)": r"blk.\1.attn_norm.\2",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.(\w+)": r"blk.\1.ffn_norm.\2",
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(?:gate|router)\.(\w+)": r"blk.\1.ffn_gate_inp.\2",
    r"model\.layers\.(\d+)\.mlp\.shared_experts?\.(\w+)_proj\.(\w+)": r"blk.\1.ffn_\2_shexp.\3",
    r"model\.layers\.(\d+)\.mlp\.shared_expert_gate\.(\w+)": r"blk.\1.ffn_gate_inp_shexp.\2",
}
_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight"
)
_PART = {"w1": "gate", "w2": "down", "w3": "up"}


def plain_model(kind: str, folder: Path, **sizes: Any) -> dict[str, torch.Tensor]:
    """A tiny model in ``folder``, and its tensors as they are published."""
    wanted = {"vocab_size": VOCAB, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 266}
    model = tiny_model(kind, **{**wanted, **SIZES[kind], **sizes})
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def gguf_tensors(
    kind: str, config: Any, plain: Mapping[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """The tensors of the GGUF file of a model, in fp32."""
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in plain.items():
        if kind == "gpt_oss" and ".mlp.experts." in name:
            found |= _gpt_oss_experts(name, tensor)
        elif name.endswith("kv_b_proj.weight"):
            layer = name.split(".")[2]
            nope, rank = config.qk_nope_head_dim, tensor.shape[1]
            heads = tensor.view(config.num_attention_heads, -1, rank)
            found[f"blk.{layer}.attn_k_b.weight"] = heads[:, :nope].transpose(1, 2).float().numpy()
            found[f"blk.{layer}.attn_v_b.weight"] = heads[:, nope:].float().numpy()
        elif match := _EXPERT.fullmatch(name):
            layer, number, part = match.groups()
            part = _PART.get(part, part.removesuffix("_proj"))
            stack = stacks.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", {})
            stack[int(number)] = tensor
        else:
            found[_renamed(kind, name)] = _laid_out(kind, config, name, tensor).float().numpy()
    for name, stack in stacks.items():
        found[name] = torch.stack([stack[number] for number in sorted(stack)]).float().numpy()
    return found


def _renamed(kind: str, name: str) -> str:
    for pattern, target in _NAMES.items():
        if match := re.fullmatch(pattern, name):
            made = match.expand(target)
            return made.replace("ffn_norm", "post_attention_norm") if kind == "gpt_oss" else made
    raise AssertionError(name)


def _laid_out(kind: str, config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith("shared_expert_gate.weight"):
        return tensor[0]
    if kind == "mixtral" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        rows = tensor.shape[0]
        return tensor.view(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _gpt_oss_experts(name: str, tensor: torch.Tensor) -> dict[str, np.ndarray]:
    layer, part = name.split(".")[2], name.split(".")[-1]
    start, kind = f"blk.{layer}.ffn_", "bias" if part.endswith("_bias") else "weight"
    if kind == "weight":
        tensor = tensor.transpose(1, 2)
    if part.startswith("down"):
        return {f"{start}down_exps.{kind}": tensor.contiguous().numpy()}
    return {
        f"{start}gate_exps.{kind}": tensor[:, ::2].contiguous().numpy(),
        f"{start}up_exps.{kind}": tensor[:, 1::2].contiguous().numpy(),
    }


def fields_of(kind: str, config: Any) -> dict[str, Any]:
    """The metadata of the architecture, without its name before the keys."""
    rope = config.rope_parameters
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_count": next(
            getattr(config, one)
            for one in ("n_routed_experts", "num_experts", "num_local_experts")
            if one in type(config)().to_dict()
        ),
        "expert_used_count": config.num_experts_per_tok,
    }
    if kind in ("qwen3_moe", "gpt_oss"):
        fields |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    if kind.startswith("qwen"):
        fields["expert_feed_forward_length"] = config.moe_intermediate_size
    if kind == "qwen2_moe":
        fields["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if kind == "mixtral":
        fields["rope.dimension_count"] = config.hidden_size // config.num_attention_heads
        fields["vocab_size"] = config.vocab_size
    if kind == "gpt_oss":
        fields |= {
            "expert_feed_forward_length": config.intermediate_size,
            "attention.sliding_window": config.sliding_window,
        }
    if kind.startswith("deepseek"):
        fields |= {
            "attention.head_count_kv": 1,
            "attention.kv_lora_rank": config.kv_lora_rank,
            "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
            "attention.value_length_mla": config.v_head_dim,
            "rope.dimension_count": config.qk_rope_head_dim,
            "leading_dense_block_count": config.first_k_dense_replace,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.n_shared_experts,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
            "vocab_size": config.vocab_size,
        }
        if config.q_lora_rank:
            fields["attention.q_lora_rank"] = config.q_lora_rank
        if kind == "deepseek_v3":
            fields |= {"expert_gating_func": 2, "expert_weights_norm": config.norm_topk_prob}
        if rope["rope_type"] == "yarn":
            fields["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if rope["rope_type"] == "yarn":
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    return fields


def vocabulary() -> dict[str, Any]:
    """A byte-level vocabulary with a few merges, as metadata."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), *WORDS]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    special = [*SPECIAL]
    types += [gguf.TokenType.CONTROL] * len(special)
    tokens += special
    while len(tokens) < VOCAB:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(gguf.TokenType.UNUSED)
    merges = ["t h", "th e", "Ġ the", "q u", "Ġ qu", "i c", "ic k", "a n", "Ġ a", "e r", "i n"]
    merges = [one for one in merges if one.replace(" ", "") in tokens and _made(one, tokens)]
    return {"tokens": tokens, "types": types, "merges": merges, "template": TEMPLATE}


def _made(merge: str, tokens: list[str]) -> bool:
    return all(part in tokens for part in merge.split(" "))


Typed = Callable[[str, np.ndarray], gguf.GGMLQuantizationType]


def all_of(name: str) -> Typed:
    """Every matrix in one type, norms, biases and routers in F32, as llama.cpp has it."""

    def typed(tensor: str, values: np.ndarray) -> gguf.GGMLQuantizationType:
        small = values.ndim < 2 or "ffn_gate_inp" in tensor or tensor.endswith(".bias")
        return gguf.GGMLQuantizationType["F32" if small else name]

    return typed


def write_gguf(
    path: Path,
    kind: str,
    config: Any,
    plain: Mapping[str, torch.Tensor],
    typed: Typed | None = None,
    *,
    fields: Mapping[str, Any] | None = None,
    split: str = "qwen2",
    tokens: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    packed: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
) -> dict[str, np.ndarray]:
    """Write a model, and give what the ``gguf`` library reads its tensors as.

    Args:
        typed: the GGML type of each tensor; F32 by default.
        fields: of the architecture, in the place of ``fields_of``.
        split: llama.cpp's name of the way in which text is split.
        tokens: ``vocabulary()`` by default.
        tensors: in the place of ``gguf_tensors``.
        packed: tensors that are blocks already, with their type.
    """
    typed = typed or all_of("F32")
    writer = gguf.GGUFWriter(path, ARCHITECTURES[kind])
    for key, value in (fields or fields_of(kind, config)).items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
        }
        add[type(value)](f"{ARCHITECTURES[kind]}.{key}", value)
    words = tokens or vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(words["tokens"])
    writer.add_token_types(words["types"])
    writer.add_token_merges(words["merges"])
    writer.add_eos_token_id(words["tokens"].index("<|endoftext|>"))
    writer.add_eot_token_id(words["tokens"].index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(words["template"])
    read: dict[str, np.ndarray] = {}
    for name, values in (tensors or gguf_tensors(kind, config, plain)).items():
        if packed is not None and name in packed:
            writer.add_tensor(name, packed[name][0], raw_dtype=packed[name][1])
            continue
        number = typed(name, values)
        data = gguf.quantize(np.ascontiguousarray(values, np.float32), number)
        writer.add_tensor(name, data, raw_dtype=number)
        read[name] = gguf.dequantize(data, number).reshape(values.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read
