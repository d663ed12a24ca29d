"""FP8 weights with a scale for a tensor, a row or a block; blocks at the edges may be cut.

The product is taken in fp32 and rounded once, as ``Fp8Dequantize`` of transformers does, which takes no cut blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(values: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weights.

    Args:
        values: FP8 [R, C].
        scales: fp32, one for each block in row order.
        block: rows and columns that share a scale.
        dtype: of the result.

    Returns:
        [R, C].
    """
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
