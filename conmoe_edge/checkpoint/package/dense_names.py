"""How a package stores the weight of a dense linear layer in int8: two tensors instead of one. No torch here.

``<name>`` holds the values, int8 [rows, columns], and ``<name>_scale`` one bf16 scale for each row, so that value =
q * scale (``quantise.py``). For ``model.layers.0.self_attn.q_proj.weight`` that makes ``...q_proj.weight_scale``, the
name of a parameter beside ``weight``.
"""

from __future__ import annotations

from collections.abc import Mapping

from conmoe_edge.checkpoint.tensors.tensor_index import TensorEntry

DENSE_SCALE = "_scale"


def quantised_names(tensors: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    """The weights that are stored in int8, sorted."""
    return tuple(
        name
        for name, entry in sorted(tensors.items())
        if entry.dtype == "I8"
        and len(entry.shape) == 2
        and (scale := tensors.get(name + DENSE_SCALE)) is not None
        and scale.dtype == "BF16"
        and scale.shape == entry.shape[:1]
    )
