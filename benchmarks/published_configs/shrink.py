"""A configuration of a few hundred thousand numbers with every kind of layer that the published one has.

Nothing here knows a single model. Layers: the shortest run of first layers that has all kinds, where a kind is what a
layer is made of and what the config calls it. Sizes: by the names of the fields. Lists and words with an entry for each
layer are cut.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.published_configs.build import build
from conmoe_edge.model.experts import find_decoder, is_experts_module

VOCABULARY = 96
_HIDDEN, _HEADS, _EXPERTS, _TOP_K = 64, 4, 8, 3
_LAYER_FIELDS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_SMALL = {
    "hidden_size": _HIDDEN,
    "d_model": _HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "d_ff": 48,
    "ffn_hidden_size": 48,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "sliding_window": 8,
    "block_size": 8,
    "max_window_layers": 1,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 2,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "kv_channels": 16,
}
_EXPERT_COUNT = re.compile(
    r"^(num|n)_(local_|routed_)?experts$|^moe_num_experts$|^moe_num_primary_experts$"
)
_TOP_COUNT = re.compile(
    r"^num_experts_per_tok(en)?$|^moe_k$|^moe_topk$|^top_k_experts$|^moe_top_k$"
)
_WIDTH = re.compile(r"(intermediate|ffn|hidden|head)_?(size|dim)$|_rank$|expert_dim$|_dim$")
_LATENT_SHARE = 8
"""Where keys come from a latent vector, parts of a head add up and are rotated by shares: all are cut alike."""
_HEAD_SIZES = ("head_dim", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TOKEN = re.compile(r"(token_id|token_index|_id)$")
_KEPT_DIMS = re.compile(r"conv|kernel|patch|spatial|temporal")


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The small configuration. It declares no quantisation."""
    full = build(config, torch.bfloat16, "meta")
    layers = layers_with_all_kinds(full)
    text = full.config.get_text_config()
    small = copy.deepcopy(config)
    for part in _parts(small):
        part.pop("quantization_config", None)
        part.pop("torch_dtype", None)
        part.pop("dtype", None)
    nested = small.get("text_config")
    inner: dict[str, Any] = nested if isinstance(nested, dict) else small
    _cut_layers(inner, text.num_hidden_layers, layers)
    for name, part in small.items():
        if name.endswith("_config") and isinstance(part, dict) and part is not inner:
            _add_missing(part, getattr(full.config, name, None))
    for part in _parts(small):
        _make_narrow(part)
    inner |= _TOKENS  # those of a class may be beyond the small vocabulary
    return small


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and the configs in it (text, vision)."""
    return [
        config,
        *(one for key, one in config.items() if key.endswith("_config") and isinstance(one, dict)),
    ]


def layers_with_all_kinds(model: PreTrainedModel) -> int:
    """How many of the first layers have every kind that the model has, and experts in at least two of them."""
    decoder = find_decoder(model)
    if decoder is None:
        return 2
    layers: nn.ModuleList = model.get_submodule(decoder.prefix)  # type: ignore[assignment]
    text = model.config.get_text_config()
    kinds = [(_kind(layer), _words(text, index, len(layers))) for index, layer in enumerate(layers)]
    wanted, seen = set(kinds), set()
    for index, kind in enumerate(kinds):
        seen.add(kind)
        experts = sum(number <= index for number in decoder.experts)
        if seen == wanted and experts >= min(2, len(decoder.experts)):
            return index + 1
    return len(layers)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What a layer is made of, sizes included, and the windows that its attention keeps to."""
    experts = sorted(type(one).__name__ for one in layer.modules() if is_experts_module(one))
    shapes = sorted((name, tuple(one.shape)) for name, one in layer.named_parameters())
    windows = sorted(
        f"{name}.{key}={value}"
        for name, one in layer.named_modules()
        for key, value in vars(one).items()
        if key in ("sliding_window", "is_sliding", "layer_type", "attention_type", "use_rope")
        and isinstance(value, str | int | bool | type(None))
    )
    return tuple(experts), tuple(shapes), tuple(windows)


def _words(text: Any, index: int, layers: int) -> tuple[str, ...]:
    """What the config's lists with an entry for each layer say of this one."""
    found = []
    for name in sorted(vars(text)):
        value = vars(text)[name]
        if isinstance(value, list | tuple) and len(value) == layers and isinstance(value[0], str):
            found.append(f"{name}={value[index]}")
    return tuple(found)


def _cut_layers(config: dict[str, Any], before: int, layers: int) -> None:
    for name in _LAYER_FIELDS:
        if name in config:
            config[name] = layers
    for name, value in list(config.items()):
        if isinstance(value, list | str) and len(value) == before and name != "architectures":
            config[name] = value[:layers]
        elif isinstance(value, list) and before < len(value) <= before + 4:
            config[name] = value[:layers]  # and one for each layer that predicts further tokens
        elif isinstance(value, list) and "layers" in name:
            config[name] = [one for one in value if not isinstance(one, int) or one <= layers]
        elif isinstance(value, dict) and all(key.isdigit() for key in value):
            config[name] = {key: one for key, one in value.items() if int(key) < layers}
        elif isinstance(value, dict) and name.endswith("_config"):
            for key, inner in value.items():
                if isinstance(inner, list) and "layers" in key:
                    value[key] = [one for one in inner if one <= layers]
    for name in ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers"):
        if config.get(name):
            config[name] = 0


def _add_missing(part: dict[str, Any], built: Any) -> None:
    """Sizes that a file calls something else than the class, or leaves to it: what the class has, under its name."""
    for name, value in sorted(vars(built).items()) if built is not None else ():
        if type(value) is int and name not in part and not name.startswith("_"):
            part[name] = value
    if "num_hidden_layers" in part:
        part["num_hidden_layers"] = min(part["num_hidden_layers"], 2)


def _make_narrow(config: dict[str, Any]) -> None:
    heads = config.get("num_attention_heads")
    latent = "qk_rope_head_dim" in config or "qk_nope_head_dim" in config
    rotated = config.get("rotary_dim", 0) / (config.get("head_dim") or 1)
    for name, value in list(config.items()):
        if isinstance(value, bool) or not isinstance(value, int):
            if isinstance(value, list) and value and all(type(one) is int for one in value):
                if _TOP_COUNT.search(name) or _WIDTH.search(name) or name == "num_shared_expert":
                    config[name] = [_small(name, one, heads) for one in value]
                elif _TOKEN.search(name):
                    config[name] = [2]
            elif isinstance(value, dict) and all(key.isdigit() for key in value):
                for inner in value.values():
                    _make_narrow(inner)
            elif isinstance(value, dict) and name.startswith(("rope", "linear_attn")):
                _make_rope_narrow(value)
            continue
        if latent and name in _HEAD_SIZES:
            config[name] = max(4, value // _LATENT_SHARE)
        else:
            config[name] = _small(name, value, heads)
    if rotated and config.get("head_dim"):
        config["rotary_dim"] = int(rotated * config["head_dim"])
    for name in ("n_group", "num_expert_group"):
        if (config.get(name) or 1) > 1:
            config[name], config["topk_group"] = 2, 1


def _small(name: str, value: int, heads: Any) -> int:
    if _EXPERT_COUNT.search(name):
        return min(value, _EXPERTS)
    if _TOP_COUNT.search(name):
        return min(value, _TOP_K)
    if name.startswith("num") and name.endswith("attention_heads"):
        return min(value, _HEADS)
    if name.endswith("key_value_heads"):
        return 1 if value == 1 else _HEADS if value == heads else 2
    if name in _SMALL:
        return min(value, _SMALL[name])
    if name.endswith("vocab_size"):
        return min(value, VOCABULARY)
    if _TOKEN.search(name):
        return _TOKENS.get(name, min(value, VOCABULARY - 1))
    if _WIDTH.search(name) and not _KEPT_DIMS.search(name):
        return min(value, 32)
    return value


def _make_rope_narrow(rope: dict[str, Any]) -> None:
    """Factors with one entry for each pair of rotated numbers, and the parts of a rotation over three axes."""
    half = _SMALL["head_dim"] // 2
    for name, value in list(rope.items()):
        if isinstance(value, dict):
            _make_rope_narrow(value)
        elif name in ("long_factor", "short_factor"):
            rope[name] = value[:half]
        elif name == "mrope_section":
            pairs = int(half * rope.get("partial_rotary_factor", 1.0))
            rope[name] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
