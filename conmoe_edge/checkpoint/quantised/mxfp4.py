"""MXFP4: blocks of 32 E2M1 numbers along a row, two in a byte, and an E8M0 scale for each block.

gpt-oss stacks its experts and has their matrices transposed: ``X_blocks`` and ``X_scales`` are ``X`` [E, C, R].
compressed-tensors has ``X.weight_packed`` [R, C/2] and ``X.weight_scale``, which are ``X.weight`` [R, C].
Source: the OCP Microscaling Formats specification 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.quantise import E2M1, power_of_two
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
    scales = parts["scales"].view(torch.uint8)
    if bool((scales == NO_NUMBER).any()):
        raise logical.broken("scales", "holds NaN")
    matrix = expanded(parts["values"].flatten(1), scales, getattr(torch, logical.dtype))
    return matrix.T.contiguous() if logical.layout else matrix


def expanded(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [R, C/2] and [R, C/32] -> [R, C] in ``dtype``: the bits that transformers gives, in a fraction of its time.

    Two numbers come out of the table for each byte. Their product with a power of two is exact in bf16 and fp32, but
    where it is too small or too large for the format; then it is rounded once, as there.
    """
    exact = dtype in (torch.bfloat16, torch.float32)
    made = dtype if exact else torch.float32
    pairs = _pairs(made)
    numbers = pairs.index_select(0, values.flatten().int()).view(made)
    factor = power_of_two(scales.int() - 127).to(made).unsqueeze(-1)
    return numbers.view(*scales.shape, BLOCK).mul_(factor).flatten(1).to(dtype)


@cache
def _pairs(dtype: torch.dtype) -> Tensor:
    """The two numbers of each byte as one whole number of twice the width, the first in the low half."""
    table = torch.tensor(E2M1, dtype=dtype)
    both = torch.stack((table.repeat(16), table.repeat_interleave(16)), 1)
    return both.view(torch.int32 if dtype.itemsize == 2 else torch.int64).flatten()
