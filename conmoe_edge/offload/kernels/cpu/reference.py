"""What the operator computes, in plain tensor operations: the check at its first use, and the tests.

Beside plain weights activations are what they are. Beside int8 and int4 they are rounded: every block of columns (32;
int4: a group of the weights) becomes whole numbers of -127..127 times its largest size / 127. The zeros of int4 are
multiplied with the exact sum of a group.

Memory: the weights in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.quantise import Matrix

BLOCK = 32


def product(matrix: Matrix, x: Tensor) -> Tensor:
    """W x for activations [t, K]: fp64 [t, R]."""
    seen = rounded(x, matrix).double()
    wide = matrix.dequantise().double()  # [R, K]
    if matrix.kind != "int4":
        return seen @ wide.T
    assert matrix.scales is not None
    zeros = matrix.scales[..., 1].double()  # [K / group, R]
    numbers = (wide.unflatten(1, (-1, matrix.group)) - zeros.T.unsqueeze(-1)).flatten(1)
    sums = x.double().unflatten(-1, (-1, matrix.group)).sum(-1)  # [t, K / group]
    return seen @ numbers.T + sums @ zeros


def rounded(x: Tensor, matrix: Matrix) -> Tensor:
    """Activations [..., K] as they meet the weights of ``matrix``, in fp32."""
    if matrix.kind == "plain":
        return x.float()
    block = matrix.group if matrix.kind == "int4" else BLOCK
    columns = x.shape[-1]
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    most = blocks.abs().amax(-1, keepdim=True)
    factor = torch.where(most > 1e-30, 127.0 / most, 0.0)
    return ((blocks * factor).round() * (most / 127.0)).flatten(-2)[..., :columns]
