"""The architectures that are read from GGUF: the config of each, and the tensors of a plain checkpoint of it.

A family says which parameters a decoder layer has under transformers' names. Which GGUF tensor each of them is, the
``gguf`` library's tensor maps say. What a config does not find in the metadata it has from the shapes of the tensors,
or from what llama.cpp computes for the architecture without asking. ``tests/checkpoint/gguf`` compares with llama.cpp.

Sources: the conversion scripts of llama.cpp (which fields they write, what they turn and split), its graphs, and
transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from conmoe_edge.checkpoint.gguf.metadata import Fields

Shapes = Mapping[str, tuple[int, ...]]

OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_ATTENTION = tuple(f"self_attn.{one}_proj.{kind}" for one in "qkvo" for kind in ("weight", "bias"))
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        architecture: as GGUF calls it.
        config: config.json of the plain model.
        layer: parameters of a decoder layer outside the routed experts; those that a file lacks are left out.
        experts: for each stack of experts in the file, by the name that the tensor map knows it under, the name in the
            plain checkpoint; ``{}`` stands for the expert's number.
        fused: which two of the latter are ``gate`` and ``up``, which a file may have in one stack.
        experts_everywhere: llama.cpp has no layers without experts in this architecture.
        pairs: names of parameters that hold gate and up of all experts, interleaved and transposed, and where they are
            in the file; ``flipped`` the same for a stack that is only transposed.
        turned: parameters whose rows were put in llama.cpp's order for rotary embeddings, and the field with the number
            of heads.
        joined: a parameter that the file may have in two: keys, turned over, and values of each head.
        aliases: parameters that the tensor map knows under another name.
    """

    architecture: str
    config: Callable[[Fields, Shapes], dict[str, Any]]
    layer: tuple[str, ...]
    experts: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    experts_everywhere: bool = False
    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    flipped: Mapping[str, str] = field(default_factory=dict)
    turned: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


def _per_expert(module: str, names: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{module}.{known}.weight": f"{module}.{{}}.{name}.weight" for known, name in names.items()
    }


def _gate_and_up(module: str, gate: str, up: str) -> dict[str, str]:
    return {f"{module}.{{}}.{gate}.weight": "gate", f"{module}.{{}}.{up}.weight": "up"}


_PROJECTIONS = {one: one for one in ("gate_proj", "up_proj", "down_proj")}


def _decoder(fields: Fields, shapes: Shapes) -> dict[str, Any]:
    """What all of them have: a decoder with grouped attention and RMS norms."""
    heads = fields.count("attention.head_count")
    width = fields.count("embedding_length")
    vocabulary = shapes.get("token_embd.weight", (0,))[0]
    fields.only("vocab_size", vocabulary)
    fields.only("attention.causal", True)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": fields.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("attention.head_count_kv", heads),
        "max_position_embeddings": fields.count("context_length"),
        "rms_norm_eps": fields.positive("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
        "num_experts_per_tok": fields.count("expert_used_count"),
    }


def _head_width(fields: Fields, config: Mapping[str, Any]) -> int:
    """Numbers of an attention head; all of them are turned by the rotary embedding."""
    usual = max(1, config["hidden_size"] // config["num_attention_heads"])
    width = fields.count("attention.key_length", usual)
    fields.only("attention.value_length", width)
    fields.only("rope.dimension_count", width)
    return width


def _rope(fields: Fields, **known: Any) -> dict[str, Any]:
    """``rope_parameters``. llama.cpp computes the length factor of YaRN from its factor, as transformers does."""
    theta = fields.positive("rope.freq_base", 10000.0)
    kind = fields.text("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", 1.0)
    original = fields.count("rope.scaling.original_context_length", None)
    fields.truth("rope.scaling.finetuned", None)
    for key in ("attn_factor", "yarn_ext_factor", "yarn_attn_factor"):
        fields.only(f"rope.scaling.{key}", 1.0)
    fast = fields.positive("rope.scaling.yarn_beta_fast", 32.0)
    slow = fields.positive("rope.scaling.yarn_beta_slow", 1.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        if factor not in (0.0, 1.0):
            fields.refuse("rope.scaling.factor", factor, "it does not say what kind of scaling")
        return {"rope_type": "default", "rope_theta": theta}
    if factor < 1.0:
        fields.refuse("rope.scaling.factor", factor, "it is 1 or more")
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "yarn" or original is None:
        fields.refuse("rope.scaling.type", kind, "none, linear and whole yarn are read")
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": fast,
        "beta_slow": slow,
        **known,
    }


def _width_of(shapes: Shapes, name: str, axis: int) -> int:
    """A size of a tensor in the first layer that has it; 0 where none has."""
    found = [shape for key, shape in shapes.items() if key.endswith(f".{name}")]
    return found[0][axis] if found and len(found[0]) > abs(axis) - (axis < 0) else 0


def _expert_width(fields: Fields, shapes: Shapes) -> int:
    """Neurons of a routed expert: the inputs of its down projection."""
    width = _width_of(shapes, "ffn_down_exps.weight", -1)
    fields.only("expert_feed_forward_length", width)
    return width


def _has(shapes: Shapes, name: str) -> bool:
    return any(key.endswith(f".{name}") for key in shapes)


def _olmoe(fields: Fields, shapes: Shapes) -> dict[str, Any]:
    config = _decoder(fields, shapes)
    _head_width(fields, config)
    fields.only("feed_forward_length", _expert_width(fields, shapes))
    fields.only("expert_gating_func", 1)
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        **config,
        "num_experts": fields.count("expert_count"),
        "intermediate_size": _expert_width(fields, shapes),
        "norm_topk_prob": fields.truth("expert_weights_norm", False),
        "attention_bias": _has(shapes, "attn_q.bias"),
        "clip_qkv": fields.positive("attention.clamp_kqv", None),
        "rope_parameters": _rope(fields),
        "pad_token_id": None,
    }


def _qwen(fields: Fields, shapes: Shapes, *, normalised: bool) -> dict[str, Any]:
    """What Qwen2-MoE and Qwen3-MoE have in common; ``normalised``: what llama.cpp makes of the weights of experts."""
    config = _decoder(fields, shapes)
    fields.only("expert_gating_func", 1)
    width = _expert_width(fields, shapes)
    return {
        **config,
        "num_experts": fields.count("expert_count"),
        "intermediate_size": fields.count("feed_forward_length", width),
        "moe_intermediate_size": width,
        "norm_topk_prob": fields.truth("expert_weights_norm", normalised),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "rope_parameters": _rope(fields),
    }


def _qwen2_moe(fields: Fields, shapes: Shapes) -> dict[str, Any]:
    config = _qwen(fields, shapes, normalised=False)
    usual = config["hidden_size"] // max(1, config["num_attention_heads"])
    if _head_width(fields, config) != usual:
        fields.refuse("attention.key_length", "", f"heads of this model have {usual} numbers")
    shared = _width_of(shapes, "ffn_down_shexp.weight", -1)
    fields.only("expert_shared_feed_forward_length", shared)
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        **config,
        "shared_expert_intermediate_size": shared,
        "qkv_bias": _has(shapes, "attn_q.bias"),
    }


def _qwen3_moe(fields: Fields, shapes: Shapes) -> dict[str, Any]:
    config = _qwen(fields, shapes, normalised=True)
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        **config,
        "head_dim": _head_width(fields, config),
        "attention_bias": _has(shapes, "attn_q.bias"),
    }


def _gpt_oss(fields: Fields, shapes: Shapes) -> dict[str, Any]:
    config = _decoder(fields, shapes)
    fields.only("attention.sliding_window_pattern", 2)
    fields.only("expert_gating_func", 1, 3)  # softmax over the chosen ones has a number of its own
    width = _expert_width(fields, shapes)
    fields.only("feed_forward_length", width)
    layers = config["num_hidden_layers"]
    kinds = ("sliding_attention", "full_attention")
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        **config,
        "head_dim": _head_width(fields, config),
        "num_local_experts": fields.count("expert_count"),
        "intermediate_size": width,
        "sliding_window": fields.count("attention.sliding_window"),
        "layer_types": [kinds[number % 2] for number in range(min(layers, 4096))],
        "attention_bias": _has(shapes, "attn_q.bias"),
        # No file says it, and every published model of this family has it.
        "rope_parameters": _rope(fields, truncate=False),
    }


def _deepseek(fields: Fields, shapes: Shapes) -> dict[str, Any]:
    """DeepSeek-V2 (softmax) and V3 (sigmoid). Files with compressed attention describe it as one key-value head."""
    config = _decoder(fields, shapes)
    heads = config["num_key_value_heads"] = config["num_attention_heads"]
    fields.only("attention.head_count_kv", 1, heads)
    rank, turned = fields.count("attention.kv_lora_rank"), fields.count("rope.dimension_count")
    plain_key, plain_value = (
        fields.count("attention.key_length"),
        fields.count("attention.value_length"),
    )
    key = fields.count("attention.key_length_mla", plain_key)
    value = fields.count("attention.value_length_mla", plain_value)
    if key <= turned:
        fields.refuse("attention.key_length", key, f"{turned} numbers of a key are turned")
    width = _expert_width(fields, shapes)
    gating = fields.count("expert_gating_func", 1)
    queries = fields.count("attention.q_lora_rank", None)
    groups = fields.count("expert_group_count", None)
    used = fields.count("expert_group_used_count", None)
    if groups is None and (gating == 2 or queries is not None):
        fields.refuse("expert_group_count", "nothing", "which experts may be chosen depends on it")
    grouped = groups not in (None, 1)
    rope = _rope(fields)
    if rope["rope_type"] == "yarn":
        whole = _shortest_of(10 * fields.positive("rope.scaling.yarn_log_multiplier"))
        rope |= {"mscale": whole, "mscale_all_dim": whole}  # the two are equal in this family
    fields.only("nextn_predict_layers", 0)
    common = {
        **config,
        "intermediate_size": fields.count("feed_forward_length"),
        "moe_intermediate_size": width,
        "n_routed_experts": fields.count("expert_count"),
        "n_shared_experts": fields.count("expert_shared_count", None),
        "first_k_dense_replace": fields.whole("leading_dense_block_count", 0),
        "routed_scaling_factor": fields.positive("expert_weights_scale", 1.0),
        "kv_lora_rank": rank,
        "q_lora_rank": queries,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": value,
        "n_group": groups or 1,
        "topk_group": used or 1,
        "attention_bias": False,
        "rope_parameters": rope,
    }
    if gating == 2:
        return {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            **common,
            "norm_topk_prob": fields.truth("expert_weights_norm", False),
            "num_nextn_predict_layers": 0,
        }
    fields.only("expert_gating_func", 1)
    fields.only("expert_weights_norm", False)
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        **common,
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy" if grouped else "greedy",
    }


def _shortest_of(value: float) -> float:
    return float(f"{value:.6g}")


def _mixtral(fields: Fields, shapes: Shapes) -> dict[str, Any]:
    config = _decoder(fields, shapes)
    fields.only("expert_gating_func", 1)
    width = _expert_width(fields, shapes)
    fields.only("feed_forward_length", width)
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        **config,
        "head_dim": _head_width(fields, config),
        "num_local_experts": fields.count("expert_count"),
        "intermediate_size": width,
        "sliding_window": None,
        "rope_parameters": _rope(fields),
    }


_QWEN_SHARED = tuple(
    f"mlp.shared_expert{one}.weight" for one in ("_gate", ".gate_proj", ".up_proj", ".down_proj")
)

_LATENT = (
    *("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm"),
    *("kv_b_proj", "o_proj"),
)

FAMILIES = {
    one.architecture: one
    for one in (
        Family(
            "olmoe",
            _olmoe,
            (*_NORMS, *_ATTENTION, *_HEAD_NORMS, "mlp.gate.weight"),
            experts=_per_expert("mlp.experts", _PROJECTIONS),
            fused=_gate_and_up("mlp.experts", "gate_proj", "up_proj"),
        ),
        Family(
            "qwen2moe",
            _qwen2_moe,
            (*_NORMS, *_ATTENTION, "mlp.gate.weight", *_QWEN_SHARED),
            experts=_per_expert("mlp.experts", _PROJECTIONS),
            fused=_gate_and_up("mlp.experts", "gate_proj", "up_proj"),
            experts_everywhere=True,
        ),
        Family(
            "qwen3moe",
            _qwen3_moe,
            (*_NORMS, *_ATTENTION, *_HEAD_NORMS, "mlp.gate.weight"),
            experts=_per_expert("mlp.experts", _PROJECTIONS),
            fused=_gate_and_up("mlp.experts", "gate_proj", "up_proj"),
            experts_everywhere=True,
        ),
        Family(
            "gpt-oss",
            _gpt_oss,
            (
                *_NORMS,
                *_ATTENTION,
                "self_attn.sinks",
                "mlp.router.weight",
                "mlp.router.bias",
                "mlp.experts.down_proj_bias",
            ),
            pairs={
                "mlp.experts.gate_up_proj": (
                    "mlp.experts.gate_proj.weight",
                    "mlp.experts.up_proj.weight",
                ),
                "mlp.experts.gate_up_proj_bias": (
                    "mlp.experts.gate_proj.bias",
                    "mlp.experts.up_proj.bias",
                ),
            },
            flipped={"mlp.experts.down_proj": "mlp.experts.down_proj.weight"},
            aliases={
                "self_attn.sinks": "self_attn.sinks.weight",
                "mlp.experts.down_proj_bias": "mlp.experts.down_proj.bias",
            },
        ),
        Family(
            "deepseek2",
            _deepseek,
            (
                *_NORMS,
                *(f"self_attn.{one}.weight" for one in _LATENT),
                *(f"mlp.{one}.weight" for one in ("gate", *_PROJECTIONS)),
                *(f"mlp.shared_experts.{one}.weight" for one in _PROJECTIONS),
                "mlp.gate.e_score_correction_bias",
            ),
            experts=_per_expert("mlp.experts", _PROJECTIONS),
            fused=_gate_and_up("mlp.experts", "gate_proj", "up_proj"),
            joined={
                "self_attn.kv_b_proj.weight": (
                    "self_attn.k_b_proj.weight",
                    "self_attn.v_b_proj.weight",
                )
            },
            aliases={"mlp.gate.e_score_correction_bias": "mlp.gate.e_score_correction.bias"},
        ),
        Family(
            "llama",
            _mixtral,
            (*_NORMS, *_ATTENTION, "block_sparse_moe.gate.weight"),
            experts=_per_expert(
                "block_sparse_moe.experts", {one: one for one in ("w1", "w2", "w3")}
            ),
            fused=_gate_and_up("block_sparse_moe.experts", "w1", "w3"),
            turned={
                "self_attn.q_proj.weight": "num_attention_heads",
                "self_attn.k_proj.weight": "num_key_value_heads",
            },
        ),
    )
}
"""By GGUF's name of the architecture."""
