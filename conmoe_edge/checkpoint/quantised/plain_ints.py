"""Weights that compressed-tensors stores as int8, one number a byte (``int-quantized``), with a scale for the matrix, a
row, or a group of columns, and zero points of the same shape where they are not symmetric.

Source: ``compressors/naive_quantized`` of that library. Activations, which such models round as well, are not rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from conmoe_edge.checkpoint.quantised.compressed_settings import METHOD, IntWeights, int_weights
from conmoe_edge.checkpoint.quantised.grouped import SCALES, check_scales, product
from conmoe_edge.checkpoint.quantised.stored import PLAIN_VERSION, Headers, Logical
from conmoe_edge.errors import CheckpointError

NAME = "int8"
_UNDECLARED = (IntWeights(8, 0, True, False), IntWeights(8, -1, True, False))


def declares(settings: Mapping[str, Any]) -> bool:
    """See ``forms.Form``."""
    return settings.get("quant_method") == METHOD and settings.get("format") == "int-quantized"


def find(name: str, headers: Headers) -> Logical | None:
    """int8 ``X`` with ``X_scale``; ``layout`` is the ``IntWeights`` whose shapes these are."""
    one, scales = headers.stored[name], f"{name}_scale"
    if one.dtype != "int8" or not name.endswith(".weight") or scales not in headers.stored:
        return None
    other = headers.stored[scales]
    if len(one.shape) != 2 or 0 in one.shape or other.dtype not in SCALES:
        raise headers.odd(name, scales)
    kinds = int_weights(headers.declared) or _UNDECLARED
    fitting = [kind for kind in kinds if kind.scales_fit(other.shape, *one.shape)]
    if len({(kind.columns_of(one.shape[1]), kind.symmetric) for kind in fitting}) != 1:
        raise headers.odd(name, scales)
    kind = fitting[0]
    parts = {"values": name, "scales": scales}
    zeros = f"{name}_zero_point"
    if zeros in headers.stored:
        if kind.symmetric:
            raise CheckpointError(
                f"There are zero points ({zeros}) where none are declared.",
                "nothing says that these weights are not symmetric",
                PLAIN_VERSION,
            )
        if headers.stored[zeros][::2] != ("int8", other.shape):
            raise headers.odd(name, zeros)
        parts["zeros"] = zeros
    elif not kind.symmetric:
        headers.partner(name, zeros, what="zero points")
    nbytes = headers.nbytes(*parts.values())
    return Logical(name, headers.dtype, one.shape, NAME, nbytes, parts, kind)


def expand(logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
    """See ``forms.Form``."""
    kind: IntWeights = logical.layout
    rows, columns = logical.shape
    shape = (-1, 1) if kind.group <= 0 else parts["scales"].shape
    scales = parts["scales"].reshape(shape)
    check_scales(logical, scales)
    zeros = parts["zeros"].reshape(shape).expand(rows, -1) if "zeros" in parts else 0
    scales = scales.expand(rows, -1)
    return product(logical, parts["values"], zeros, scales, kind.columns_of(columns))
