"""What makes a family of models one of llama.cpp's architectures, and what several of them have in common.

llama.cpp computes an architecture in one way; a setting of ``config.json`` that it has no field for would be ignored
in silence, and the file would give other answers. So each architecture says which values its graph computes, and
everything else is refused by name (``require``). The fields are those that llama.cpp reads while it loads a model of
the architecture (``src/models/*.cpp`` there), under the keys of the ``gguf`` library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from conmoe_edge.errors import UnsupportedModel

RUN = "conmoe-edge chat DIR and conmoe-edge serve DIR run the package as it is"

_ONE_EXPERT = re.compile(r"(?P<prefix>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+_proj)\.weight")
_ROPE = frozenset({"rope_theta", "rope_type", "type"})
_LINEAR = _ROPE | {"factor"}
_YARN = _LINEAR | {
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "truncate",
    "attention_factor",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        arch: its number in the ``gguf`` library, whose map gives the names of tensors.
        check: raises ``UnsupportedModel`` for a config that llama.cpp would compute otherwise.
        add_fields: writes its fields; returns notes for the reader.
        reshaped: tensors by the names of ``save_pretrained`` -> tensors by the names that ``gguf``'s map knows, in the
            shapes that llama.cpp wants: the experts of a layer in one tensor for each projection, [E, out, in]. Works
            on the meta device too.
    """

    arch: gguf.MODEL_ARCH
    check: Callable[[Any], None]
    add_fields: Callable[[gguf.GGUFWriter, Any], list[str]]
    reshaped: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]


def require(config: Any, wanted: Mapping[str, Iterable[Any]]) -> None:
    """Refuse a config in which a field has none of the values that llama.cpp computes.

    A field that the config does not have counts as ``None``.

    Raises:
        UnsupportedModel: names the field.
    """
    for name, values in wanted.items():
        found = getattr(config, name, None)
        if all(found != value for value in values):
            raise not_computed(config, name, found)


def not_computed(config: Any, name: str, found: Any) -> UnsupportedModel:
    """The error for a setting that llama.cpp has no place for."""
    return UnsupportedModel(
        f"llama.cpp does not compute {config.model_type} with {name} = {str(found)[:60]}.",
        "a GGUF file of it would give other answers, without a word",
        RUN,
    )


def add_sizes(writer: gguf.GGUFWriter, config: Any, *, head: int) -> None:
    """The sizes that every architecture has; ``head``: numbers in one head."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)


def check_rope(config: Any) -> None:
    """Refuse rotary embeddings that llama.cpp computes otherwise, or not at all.

    Raises:
        UnsupportedModel: names the setting.
    """
    settings = _rope(config)
    kind = settings.get("rope_type", "default")
    known = {"default": _ROPE, "linear": _LINEAR, "yarn": _YARN}.get(kind)
    if known is None:
        raise not_computed(config, "rope_type", kind)
    for name in sorted(set(settings) - known):
        if settings[name] is not None and not (
            name == "partial_rotary_factor" and settings[name] == 1
        ):
            raise not_computed(config, f"{name} of {kind} rotary embeddings", settings[name])
    given = settings.get("attention_factor")
    if given is not None and not math.isclose(given, _yarn_attention(settings["factor"])):
        raise not_computed(config, "attention_factor", given)


def add_rope(writer: gguf.GGUFWriter, config: Any) -> list[str]:
    """The fields of rotary embeddings that ``check_rope`` let through; returns notes."""
    settings = _rope(config)
    writer.add_rope_freq_base(settings["rope_theta"])
    kind = settings.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings["factor"])
    if kind != "yarn":
        return []
    before = settings.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(settings["factor"])
    writer.add_rope_scaling_orig_ctx_len(before)
    writer.add_rope_scaling_yarn_beta_fast(float(settings.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(settings.get("beta_slow") or 1))
    if settings.get("truncate", True):
        return []
    return [
        "llama.cpp rounds the two bounds of YaRN (truncate is false in this config), as it does for every file of such "
        "a model: frequencies between them, and so logits, differ a little."
    ]


def _rope(config: Any) -> Mapping[str, Any]:
    settings = getattr(config, "rope_parameters", None)
    if not isinstance(settings, Mapping) or "rope_theta" not in settings:
        raise not_computed(config, "rope_parameters", settings)
    return settings


def _yarn_attention(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def stacked_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``….experts.N.up_proj.weight`` of all N as one ``….experts.up_proj.weight``, [E, out, in]; others as they are."""
    found: dict[str, Tensor] = {}
    groups: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _ONE_EXPERT.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        group = groups.setdefault(f"{match['prefix']}.{match['part']}.weight", {})
        group[int(match["number"])] = tensor
    for name, group in groups.items():
        found[name] = torch.stack([group[number] for number in range(len(group))])
    return found


def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head of a model that shares it with the embeddings as a tensor of its own, for llama.cpp's classes that want
    one; into ``tensors``.
    """
    if "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors
