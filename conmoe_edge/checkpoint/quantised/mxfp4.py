"""MXFP4 as gpt-oss has it: blocks of 32 E2M1 numbers along a row, two in a byte, and an E8M0 scale for each block.

transformers expands them. Source: the OCP Microscaling Formats specification 1.0.
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


def declares(settings: Mapping[str, Any]) -> bool:
    """See ``forms.Form``."""
    return settings.get("quant_method") == "mxfp4"


def find(name: str, headers: Headers) -> Logical | None:
    """``X_blocks`` uint8 [E, R, C/32, 16] with ``X_scales`` uint8 [E, R, C/32] is ``X`` [E, C, R]."""
    one = headers.stored[name]
    if not name.endswith("_blocks") or one.dtype != "uint8":
        return None
    base = name.removesuffix("_blocks")
    scales = headers.partner(name, f"{base}_scales")
    other = headers.stored[scales]
    if len(one.shape) != 4 or one.shape[-1] != BLOCK // 2 or other.dtype != "uint8":
        raise headers.odd(name, scales)
    experts, rows, blocks, _ = one.shape
    if other.shape != one.shape[:-1] or 0 in one.shape:
        raise headers.odd(name, scales)
    shape = (experts, blocks * BLOCK, rows)
    parts = {"values": name, "scales": scales}
    return Logical(base, headers.dtype, shape, NAME, headers.nbytes(name, scales), parts)


def expand(logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
    """One expert's matrix as transformers multiplies by it: [C, R] of blocks [R, C/32, 16]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    if bool((parts["scales"] == NO_NUMBER).any()):
        raise logical.broken("scales", "holds NaN")
    dtype = getattr(torch, logical.dtype)
    return convert_moe_packed_tensors(parts["values"][None], parts["scales"][None], dtype=dtype)[0]
