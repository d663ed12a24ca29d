"""FP8 weights with a scale for a tensor, a row or a block; blocks at the edges may be cut. MXFP8 is one of them: E8M0
scales, stored as bytes, for 32 numbers of a row.

The product is taken in fp32 and rounded once, as ``Fp8Dequantize`` of transformers does, which takes no cut blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.quantised.stored import Headers, Logical

NAME = "fp8"
_VALUES = frozenset({"float8_e4m3fn", "float8_e5m2"})
_SCALES = frozenset({"float32", "bfloat16", "float16", "float8_e8m0fnu"})
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8")
_COMPRESSED = ("float-quantized", "naive-quantized", "mxfp8-quantized")
_MX_BLOCK = 32
_BLOCK = 128
"""Rows and columns of a block where the settings name none."""


def declares(settings: Mapping[str, Any]) -> bool:
    """See ``forms.Form``."""
    kind = settings.get("quant_method")
    return (
        kind == "fp8"
        or (kind == "compressed-tensors" and settings.get("format") in _COMPRESSED)
        or (kind == "modelopt" and settings.get("quant_algo") in _MODELOPT)
    )


def find(name: str, headers: Headers) -> Logical | None:
    """FP8 ``X`` with ``X_scale_inv`` or ``X_scale``; ``layout`` is the block: rows and columns that share a scale."""
    one = headers.stored[name]
    if one.dtype not in _VALUES or name.endswith(("_scale", "_scale_inv")):
        return None
    scales = headers.partner(name, f"{name}_scale_inv", f"{name}_scale")
    other = headers.stored[scales]
    if f"{name}_scale_2" in headers.stored:
        raise headers.odd(name, f"{name}_scale_2")
    if len(one.shape) < 2 or 0 in one.shape:
        raise headers.odd(name, scales)
    if other.dtype in _SCALES:
        # Asked of tens of thousands of experts: the settings are gone through once for all of one shape.
        key = NAME, one.shape, other.shape
        if key not in headers.known:
            headers.known[key] = _block_of(one.shape, other.shape, headers.declared)
        block = headers.known[key]
    else:
        mx = other.dtype == "uint8" and one.shape[-1] % _MX_BLOCK == 0
        fits = mx and other.shape == (*one.shape[:-1], one.shape[-1] // _MX_BLOCK)
        block = (1, _MX_BLOCK) if fits else None
    if block is None:
        raise headers.odd(name, scales)
    nbytes, parts = headers.nbytes(name, scales), {"values": name, "scales": scales}
    return Logical(name, headers.dtype, one.shape, NAME, nbytes, parts, block)


def _block_of(
    shape: tuple[int, ...], scales: tuple[int, ...], declared: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; ``None`` where the shapes do not tell."""
    *lead, rows, columns = shape
    if math.prod(scales) == 1 and not any(size != 1 for size in lead):
        return rows, columns
    if scales in ((rows,), (rows, 1)) and not lead:
        return 1, columns
    if scales[:-2] != tuple(lead) or len(scales) != len(shape):
        return None
    if scales[-2:] == (rows, 1):
        return 1, columns
    if scales[-2:] == (1, 1):
        return rows, columns
    block = _declared_block(declared)
    if not (
        isinstance(block, list | tuple)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    ):
        return None
    high, wide = block
    grid = (-(-rows // high), -(-columns // wide))
    return (high, wide) if scales[-2:] == grid else None


def _declared_block(declared: Mapping[str, Any]) -> Any:
    """As the settings have it; ``None`` where groups of compressed-tensors differ in it."""
    groups = declared.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    weights = [one.get("weights") for one in found if isinstance(one, Mapping)]
    blocks = [one.get("block_structure") for one in weights if isinstance(one, Mapping)]
    blocks = [one for one in blocks if one]
    if not blocks:
        return declared.get("weight_block_size") or (_BLOCK, _BLOCK)
    return blocks[0] if all(one == blocks[0] for one in blocks) else None


def expand(logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
    """FP8 [R, C] times its scales, one for each block in row order."""
    scales = parts["scales"]
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    factors = scales.float()
    if not bool(factors.isfinite().all()):
        raise logical.broken("scales", "holds NaN or infinity")
    if bool((factors < 0).any()):
        raise logical.broken("scales", "holds a scale below 0")
    values, dtype = parts["values"], getattr(torch, logical.dtype)
    if bool((factors == 0).any()):
        # Right where a block has nothing but zeros: experts that were never trained, padding.
        zero = _product(values.float().sign(), (factors == 0).float(), logical.layout, dtype)
        if bool(zero.any()):
            raise logical.broken("scales", "holds a scale of 0 for values that are not 0")
    return _product(values, factors, logical.layout, dtype)


def _product(values: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    rows, columns = values.shape
    high, wide = block
    grid = scales.reshape(-(-rows // high), -(-columns // wide))
    if high == 1:  # a scale for each row, or for a piece of it
        factors = grid if wide >= columns else grid.repeat_interleave(wide, 1)[:, :columns]
        return (values.float() * factors).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    for number, row in enumerate(grid):
        part = slice(number * high, (number + 1) * high)
        factors = row.repeat_interleave(wide)[:columns]
        out[part] = (values[part].float() * factors).to(dtype)
    return out
