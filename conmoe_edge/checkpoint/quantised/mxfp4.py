"""MXFP4 as gpt-oss has it: blocks of 32 E2M1 numbers along a row, two in a byte, and an E8M0 scale for each block.

transformers expands them. Source: the OCP Microscaling Formats specification 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_NUMBER = 255
"""The code of NaN among E8M0 scales."""


def expand(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """One expert's matrix as transformers multiplies by it.

    Args:
        blocks: uint8 [R, C/32, 16].
        scales: uint8 [R, C/32].
        dtype: of the result.

    Returns:
        [C, R].
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0]
