"""The families that are written for llama.cpp, by their ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.export.llama.architecture import Architecture
from conmoe_edge.export.llama.gpt_oss import GPT_OSS
from conmoe_edge.export.llama.olmoe import OLMOE
from conmoe_edge.export.llama.qwen3_moe import QWEN3_MOE

ARCHITECTURES: Mapping[str, Architecture] = {
    "gpt_oss": GPT_OSS,
    "olmoe": OLMOE,
    "qwen3_moe": QWEN3_MOE,
}


def architecture_of(config: Any, *, plain: bool = False) -> Architecture:
    """The architecture of a checked config; ``plain``: whether what is exported is a plain checkpoint already.

    Raises:
        UnsupportedModel: the family is none of ``ARCHITECTURES``, or a setting is one that llama.cpp does not compute.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UnsupportedModel(
            f"{config.model_type} is not written as GGUF.",
            f"these families are: {', '.join(sorted(ARCHITECTURES))}",
            "the package is a plain checkpoint, which llama.cpp's own convert_hf_to_gguf.py may know"
            if plain
            else "export --format hf writes a plain checkpoint, which llama.cpp's own convert_hf_to_gguf.py may know",
        )
    found.check(config)
    return found
