"""How a package stores a dense matrix in fewer bits: two tensors instead of one. No torch here.

``<name>`` holds the values and ``<name>_scale`` the scales, in int8 or one of the forms of ``low_bits.py``
(``quantise.py`` has their shapes). For ``model.layers.0.self_attn.q_proj.weight`` that makes
``...q_proj.weight_scale``, the name of a tensor beside ``weight``.
"""

from __future__ import annotations

from collections.abc import Mapping

from conmoe_edge.checkpoint.format.forms import LOW_BITS, Kind, columns_of, kind_of
from conmoe_edge.checkpoint.tensors.tensor_index import TensorEntry

DENSE_SCALE = "_scale"


def quantised_forms(tensors: Mapping[str, TensorEntry]) -> dict[str, Kind]:
    """The weights that are stored in fewer bits, sorted, and how."""
    return {name: kind for name in sorted(tensors) if (kind := _form_of(tensors, name)) is not None}


def own_shapes(tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    """Name -> shape, those of weights in fewer bits as the model has them."""
    shapes = {name: entry.shape for name, entry in tensors.items()}
    for name, kind in quantised_forms(tensors).items():
        shapes[name] = (shapes[name][0], columns_of(kind, shapes[name]))
    return shapes


def _form_of(tensors: Mapping[str, TensorEntry], name: str) -> Kind | None:
    values, scales = tensors[name], tensors.get(name + DENSE_SCALE)
    if scales is None or len(values.shape) != 2:
        return None
    kind = kind_of((values.torch_name, values.shape), (scales.torch_name, scales.shape))
    if kind == "int8":
        return kind if scales.shape == values.shape[:1] else None
    return kind if kind in LOW_BITS else None
