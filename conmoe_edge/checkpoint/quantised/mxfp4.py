"""MXFP4: blocks of 32 E2M1 numbers along a row, two in a byte, and an E8M0 scale for each block.

gpt-oss stacks its experts and has their matrices transposed: ``X_blocks`` and ``X_scales`` are ``X`` [E, C, R].
compressed-tensors has ``X.weight_packed`` [R, C/2] and ``X.weight_scale``, which are ``X.weight`` [R, C].
transformers expands both. Source: the OCP Microscaling Formats specification 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.quantised.stored import Headers, Logical

NAME = "mxfp4"
BLOCK = 32
NO_NUMBER = 255
"""The code of NaN among E8M0 scales."""
_PACKED = ".weight_packed"
_SCALES = ("uint8", "float8_e8m0fnu")


def declares(settings: Mapping[str, Any]) -> bool:
    """See ``forms.Form``."""
    kind = settings.get("quant_method")
    return kind == "mxfp4" or (
        kind == "compressed-tensors" and settings.get("format") == "mxfp4-pack-quantized"
    )


def find(name: str, headers: Headers) -> Logical | None:
    """Bytes with E8M0 scales beside them; ``layout`` says whether the expanded matrix is [C, R]."""
    if headers.stored[name].dtype != "uint8":
        return None
    if name.endswith("_blocks"):
        return _stacked(name, headers)
    return _linear(name, headers) if name.endswith(_PACKED) else None


def _stacked(name: str, headers: Headers) -> Logical:
    """``X_blocks`` uint8 [E, R, C/32, 16] with ``X_scales`` uint8 [E, R, C/32]."""
    one, base = headers.stored[name], name.removesuffix("_blocks")
    scales = headers.partner(name, f"{base}_scales")
    other = headers.stored[scales]
    if len(one.shape) != 4 or one.shape[-1] != BLOCK // 2 or other.dtype != "uint8":
        raise headers.odd(name, scales)
    experts, rows, blocks, _ = one.shape
    if other.shape != one.shape[:-1] or 0 in one.shape:
        raise headers.odd(name, scales)
    shape = (experts, blocks * BLOCK, rows)
    parts = {"values": name, "scales": scales}
    nbytes = headers.nbytes(name, scales)
    return Logical(base, headers.dtype, shape, NAME, nbytes, parts, True)


def _linear(name: str, headers: Headers) -> Logical | None:
    """``X.weight_packed`` uint8 [R, C/2] with ``X.weight_scale`` [R, C/32]; NVFP4 has scales of another format."""
    base = name.removesuffix("_packed")
    scales = headers.partner(name, f"{base}_scale")
    one, other = headers.stored[name], headers.stored[scales]
    if other.dtype not in _SCALES:
        return None
    if len(one.shape) != 2 or 0 in one.shape or one.shape[1] % (BLOCK // 2):
        raise headers.odd(name, scales)
    rows, half = one.shape
    if other.shape != (rows, 2 * half // BLOCK):
        raise headers.odd(name, scales)
    parts = {"values": name, "scales": scales}
    nbytes = headers.nbytes(name, scales)
    return Logical(base, headers.dtype, (rows, 2 * half), NAME, nbytes, parts, False)


def expand(logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
    """One matrix: [C, R] of a stack's blocks [R, C/32, 16], as gpt-oss multiplies by it, else [R, C] of [R, C/2]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    scales = parts["scales"].view(torch.uint8)
    if bool((scales == NO_NUMBER).any()):
        raise logical.broken("scales", "holds NaN")
    blocks = (
        parts["values"].unflatten(-1, (-1, BLOCK // 2)) if not logical.layout else parts["values"]
    )
    dtype = getattr(torch, logical.dtype)
    matrix = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0]
    return matrix if logical.layout else matrix.T
