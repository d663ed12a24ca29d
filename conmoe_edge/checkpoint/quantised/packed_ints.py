"""Weights of 2 to 8 bits that compressed-tensors has packed (``pack-quantized``).

``X_packed`` int32 [R, words] holds the numbers of a row one behind the other, each 2^(bits - 1) more than it is.
``X_scale`` has a scale for the matrix, a row, or a group of columns; ``X_zero_point`` is packed likewise down the rows
(one for a whole matrix is int8); ``X_shape`` says R and C; ``X_g_idx`` names the group of each column.
Source: ``compressors/pack_quantized`` of that library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from conmoe_edge.checkpoint.quantised.bit_fields import unpack, words_of
from conmoe_edge.checkpoint.quantised.compressed_settings import (
    METHOD,
    IntWeights,
    has_format,
    int_weights,
)
from conmoe_edge.checkpoint.quantised.grouped import (
    SCALES,
    check_scales,
    four_bits,
    group_of_columns,
    product,
)
from conmoe_edge.checkpoint.quantised.stored import PLAIN_VERSION, Headers, Logical
from conmoe_edge.errors import CheckpointError, UnsupportedModel

NAME = "packed-int"
_FORMAT = "pack-quantized"
_SUFFIX = ".weight_packed"


def declares(settings: Mapping[str, Any]) -> bool:
    """See ``forms.Form``."""
    return settings.get("quant_method") == METHOD and settings.get("format") == _FORMAT


def find(name: str, headers: Headers) -> Logical | None:
    """See ``forms.Form``; ``layout`` is the ``IntWeights`` whose shapes these are."""
    one = headers.stored[name]
    if not name.endswith(_SUFFIX) or one.dtype != "int32":
        return None
    base = name.removesuffix("_packed")
    declared = int_weights(headers.declared) if has_format(headers.declared, _FORMAT) else ()
    if not declared:
        raise UnsupportedModel(
            f"Nothing says how many bits the numbers of {name} have.",
            "config.json declares no pack-quantized weights of compressed-tensors",
            PLAIN_VERSION,
        )
    scales, shape = headers.partner(name, f"{base}_scale"), headers.partner(name, f"{base}_shape")
    parts = {"values": name, "scales": scales, "shape": shape}
    for part, other in (("zeros", f"{base}_zero_point"), ("groups", f"{base}_g_idx")):
        if other in headers.stored:
            parts[part] = other
    if len(one.shape) != 2 or 0 in one.shape or headers.stored[scales].dtype not in SCALES:
        raise headers.odd(name, scales)
    sizes = headers.stored[shape]
    if sizes.shape != (2,) or sizes.dtype not in ("int64", "int32"):
        raise headers.odd(name, shape)
    fitting = {
        (kind, columns)
        for kind in declared
        if (columns := _columns(kind, one.shape, headers.stored[scales].shape))
    }
    if len(fitting) != 1:
        raise headers.odd(name, scales)
    ((kind, columns),) = fitting
    rows = one.shape[0]
    _check_others(headers, parts, kind, rows, columns)
    nbytes = headers.nbytes(*parts.values())
    grid = None
    if kind.bits == 4 and "groups" not in parts:
        wide, dtype = kind.columns_of(columns), headers.stored[scales].dtype
        grid = four_bits(columns, wide, dtype, zeros="zeros" in parts)
    return Logical(base, headers.dtype, (rows, columns), NAME, nbytes, parts, kind, grid)


def _columns(kind: IntWeights, packed: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """Columns of the matrix if it is stored so; 0 where it cannot be.

    Where groups do not tell, a row is taken to fill its words; ``X_shape`` says so or not when it is read.
    """
    rows, words = packed
    columns = words * 32 // kind.bits
    if kind.group > 0:
        columns = scales[-1] * kind.group if len(scales) == 2 else 0
    fits = columns > 0 and words == words_of(columns, kind.bits)
    return columns if fits and kind.scales_fit(scales, rows, columns) else 0


def _check_others(
    headers: Headers, parts: Mapping[str, str], kind: IntWeights, rows: int, columns: int
) -> None:
    """Zero points and the order of columns, where they have to be and not where they must not."""
    name, stored = parts["values"], headers.stored
    if "zeros" in parts:
        zeros = stored[parts["zeros"]]
        groups = columns // kind.columns_of(columns)
        packed = ("int32", (words_of(rows, kind.bits), groups))
        wanted = ("int8", stored[parts["scales"]].shape) if kind.group < 0 else packed
        if kind.symmetric:
            raise CheckpointError(
                f"There are zero points ({parts['zeros']}) where none are declared.",
                "config.json says that these weights are symmetric",
                PLAIN_VERSION,
            )
        if (zeros.dtype, zeros.shape) != wanted:
            raise headers.odd(name, parts["zeros"])
    elif not kind.symmetric:
        headers.partner(name, name.removesuffix("packed") + "zero_point", what="zero points")
    if "groups" in parts:
        order = stored[parts["groups"]]
        if kind.group <= 0 or order.dtype != "int32" or order.shape != (columns,):
            raise headers.odd(name, parts["groups"])
    elif kind.ordered:
        headers.partner(name, name.removesuffix("packed") + "g_idx", what="groups of columns")


def expand(logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
    """See ``forms.Form``."""
    kind: IntWeights = logical.layout
    rows, columns = logical.shape
    if parts["shape"].tolist() != [rows, columns]:
        raise logical.broken(
            "shape",
            f"says {parts['shape'].tolist()}, and the other tensors say {[rows, columns]}",
        )
    scales = parts["scales"].reshape(-1, 1) if kind.group <= 0 else parts["scales"]
    check_scales(logical, scales)
    groups = _order(logical, parts, kind, scales.shape[1])
    zeros = 1 << (kind.bits - 1)
    if "zeros" in parts and kind.group < 0:
        zeros += int(parts["zeros"])
    elif "zeros" in parts:
        zeros = unpack(parts["zeros"].T, kind.bits, rows).T
    numbers = unpack(parts["values"], kind.bits, columns)
    if scales.shape[0] != rows:
        scales = scales.expand(rows, -1)
    return product(logical, numbers, zeros, scales, groups)


def _order(
    logical: Logical, parts: Mapping[str, Tensor], kind: IntWeights, count: int
) -> Tensor | int:
    """Columns of a group, or the group of each column."""
    columns = logical.shape[1]
    wide = kind.columns_of(columns)
    # The library fills it with -1 where columns lie in their own order.
    if "groups" not in parts or bool((parts["groups"] == -1).all()):
        return wide
    found = group_of_columns(logical, "groups", parts["groups"], count, wide)
    return wide if found is None else found
