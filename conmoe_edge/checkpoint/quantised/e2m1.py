"""E2M1, the numbers of four bits that MXFP4 and NVFP4 are made of: two in a byte, the first in the low half.

Source: the OCP Microscaling Formats specification 1.0, table of FP4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.quantise import E2M1


def unpacked(values: Tensor) -> Tensor:
    """[R, C/2] bytes -> [R, C] numbers in fp32."""
    table = torch.tensor(E2M1)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), 1)  # of each byte
    return pairs[values.int()].flatten(-2)
