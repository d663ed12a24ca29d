"""NVFP4: blocks of 16 E2M1 numbers along a row, an E4M3 scale for each block, and one fp32 scale over all of them.

Two tools write it. modelopt calls the packed numbers ``X.weight`` and multiplies by the outer scale
``X.weight_scale_2``; of stacked experts it packs ``X`` with ``X_weight_scale``, and where the model has them transposed
(gpt-oss) the blocks lie along their columns. compressed-tensors calls them ``X.weight_packed`` and divides by
``X.weight_global_scale``.
All products are in fp32 and rounded once, in the order in which each tool takes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.quantised.e2m1 import unpacked
from conmoe_edge.checkpoint.quantised.stored import Headers, Logical

NAME = "nvfp4"
BLOCK = 16
_SCALES = "float8_e4m3fn"


@dataclass(frozen=True, slots=True)
class Layout:
    """Attributes:
    divided: by the outer scale; otherwise multiplied.
    along_columns: numbers and blocks follow each other in a column of the matrix, not in a row.
    """

    divided: bool
    along_columns: bool


def declares(settings: Mapping[str, Any]) -> bool:
    """See ``forms.Form``."""
    kind = settings.get("quant_method")
    return (kind == "modelopt" and settings.get("quant_algo") in ("NVFP4", "W4A16_NVFP4")) or (
        kind == "compressed-tensors" and settings.get("format") == "nvfp4-pack-quantized"
    )


def find(name: str, headers: Headers) -> Logical | None:
    """Bytes with E4M3 scales beside them."""
    if headers.stored[name].dtype != "uint8":
        return None
    base = name.removesuffix("_packed")
    if packed := base != name and base.endswith("weight"):
        scales, outer = f"{base}_scale", f"{base}_global_scale"
    elif name.endswith(".weight"):
        scales, outer = f"{name}_scale", f"{name}_scale_2"
    else:
        scales, outer = f"{name}_weight_scale", f"{name}_weight_scale_2"
    ours = scales in headers.stored and headers.stored[scales].dtype == _SCALES
    if not ours and outer not in headers.stored:
        return None
    parts = {
        "values": name,
        "scales": headers.partner(name, scales),
        "outer": headers.partner(name, outer),
    }
    found = _shape_of(name, parts, headers)
    return Logical(
        base if packed else name,
        headers.dtype,
        found[0],
        NAME,
        headers.nbytes(*parts.values()),
        parts,
        Layout(packed, found[1]),
    )


def _shape_of(
    name: str, parts: Mapping[str, str], headers: Headers
) -> tuple[tuple[int, ...], bool]:
    """The shape expanded, and whether blocks lie along columns: only stacks have that."""
    shape = headers.stored[name].shape
    scales, outer = headers.stored[parts["scales"]], headers.stored[parts["outer"]]
    if len(shape) not in (2, 3) or 0 in shape or scales.dtype != _SCALES:
        raise headers.odd(name, parts["scales"])
    *lead, rows, columns = shape
    one_for_each = math.prod(outer.shape) == 1 or (
        bool(lead) and outer.shape[0] == lead[0] == math.prod(outer.shape)
    )
    if outer.dtype != "float32" or not one_for_each:
        raise headers.odd(name, parts["outer"])
    half = BLOCK // 2
    if columns % half == 0 and scales.shape == (*lead, rows, columns // half):
        return (*lead, rows, 2 * columns), False
    if lead and rows % half == 0 and scales.shape == (*lead, rows // half, columns):
        return (*lead, 2 * rows, columns), True
    raise headers.odd(name, parts["scales"])


def expand(logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
    """A matrix of bytes and scales, and the outer scale, a single number.

    A scale of 0 is one that was too small for E4M3: it makes its block 0, as it does for the tools.
    """
    layout: Layout = logical.layout
    outer, scales = parts["outer"].reshape(()), parts["scales"].float()
    if not bool(outer.isfinite()) or float(outer) <= 0:
        raise logical.broken("outer", "is no number above 0")
    if not bool(scales.isfinite().all()) or bool((scales < 0).any()):
        raise logical.broken("scales", "holds NaN or a number below 0")
    values = parts["values"]
    if layout.along_columns:
        values, scales = values.T, scales.T
    numbers = unpacked(values)
    if not bool(scales.any()) and bool(numbers.any()):
        raise logical.broken("scales", "holds nothing but zeros")
    factors = scales / outer if layout.divided else scales * outer
    blocks = numbers.unflatten(-1, (-1, BLOCK)).mul_(factors.unsqueeze(-1))
    matrix = blocks.flatten(-2).to(getattr(torch, logical.dtype))
    return matrix.T if layout.along_columns else matrix
