"""A key or a value in 8 bits, as the cache holds it: one row of bytes a head and token.

A row of ``width`` numbers is ``width`` whole numbers from -127 to 127, then a byte for every ``BLOCK`` of them (the
last may be shorter): the exponent of the block's step, a power of two. That is the form MXINT8 of the OCP Microscaling
specification (version 1.0) with blocks along a head.

    step = 2^(byte - 127), number = whole number * step;  a block with NaN or infinity has byte 255 and reads as NaN

A power of two multiplies without rounding. So a row that is expanded into bf16, fp16 or fp32 holds exactly the numbers
that a kernel gets which multiplies whole numbers and step in fp32, and every path through a model sees the same keys.

``pack_rows`` and ``unpack_rows`` are the reference; ``offload/kernels/cpu/csrc/kv_rows.h`` does both to the same bits.
Memory: ``pack_rows`` two copies of what it is given in fp32, ``unpack_rows`` what it returns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 32
"""Numbers that share a step."""
_NO_NUMBER = 255
_BELOW = 6
"""The greatest number of a block lies from 2^6 to 2^7 steps."""
_LEAST = {torch.float16: 127 - 24}
"""The least byte, where 2^-126, the least normal number of fp32 and bf16, is none of the format."""


def row_bytes(width: int) -> int:
    """Bytes of a row of ``width`` numbers."""
    return width + steps_of(width)


def steps_of(width: int) -> int:
    """Steps of a row of ``width`` numbers."""
    return -(-width // BLOCK)


def pack_rows(numbers: Tensor) -> Tensor:
    """Rows [..., row_bytes(width)] in int8 from numbers [..., width] in bf16, fp16 or fp32."""
    width, least = numbers.shape[-1], _LEAST.get(numbers.dtype, 1)
    count = steps_of(width)
    wide = numbers.detach().float()
    padded = functional.pad(wide, (0, count * BLOCK - width)).unflatten(-1, (count, BLOCK))
    exponents = (padded.view(torch.int32) >> 23 & 255).amax(-1)
    broken = exponents == 255
    steps = torch.where(broken, _NO_NUMBER, (exponents - _BELOW).clamp_min(least))
    inverse = ((254 - steps.clamp_max(253)) << 23).view(torch.float32)
    whole = (padded * inverse.unsqueeze(-1)).round_().clamp_(-127, 127)
    whole = whole.masked_fill_(broken.unsqueeze(-1), 0).to(torch.int8)
    return torch.cat([whole.flatten(-2)[..., :width], steps.to(torch.uint8).view(torch.int8)], -1)


def unpack_rows(rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The numbers [..., width] of rows, in bf16, fp16 or fp32, contiguous."""
    numbers = rows[..., :width].to(dtype, memory_format=torch.contiguous_format)
    bits = rows[..., width:].contiguous().view(torch.uint8).to(torch.int32) << 23
    steps = bits.view(torch.float32).to(dtype)  # infinity for a block without numbers, times 0
    whole = width // BLOCK * BLOCK
    if whole:
        numbers[..., :whole].unflatten(-1, (-1, BLOCK)).mul_(steps[..., : whole // BLOCK, None])
    if whole < width:
        numbers[..., whole:].mul_(steps[..., -1:])
    return numbers
