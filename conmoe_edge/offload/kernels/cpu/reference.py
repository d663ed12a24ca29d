"""What the operator computes, in plain tensor operations: for the check when it is loaded, and for the tests.

Beside plain weights activations are what they are. Beside others they are rounded: every block of columns (32;
int4, grid4: a group of the weights) becomes whole numbers of -127..127 times its largest size / 127. The zeros of
int4, grid4 and of ``LOW_BITS`` are multiplied with the exact sum of a group.

Products are fp64, so memory is the weights in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from conmoe_edge.checkpoint.format import low_bits
from conmoe_edge.checkpoint.format.forms import LOW_BITS
from conmoe_edge.checkpoint.format.quantise import Matrix
from conmoe_edge.offload.kernels.cpu.structs import ExpertGate

BLOCK = 32


def product(matrix: Matrix, x: Tensor) -> Tensor:
    """W x for activations [t, K]: fp64 [t, R]."""
    seen = rounded(x, matrix).double()
    wide = _not_rounded(matrix)  # [R, K]
    zeros = _zeros(matrix)
    if zeros is None:
        return seen @ wide.T
    numbers = (wide.unflatten(1, (-1, matrix.group)) - zeros.T.unsqueeze(-1)).flatten(1)
    sums = x.double().unflatten(-1, (-1, matrix.group)).sum(-1)  # [t, K / group]
    return seen @ numbers.T + sums @ zeros


def _not_rounded(matrix: Matrix) -> Tensor:
    """The weights, fp64 [R, K]; those of grid4 as its numbers times the scale, not rounded to the scales' format."""
    wide = matrix.dequantise().double()
    if matrix.kind != "grid4" or matrix.scales is None:
        return wide
    pairs = matrix.scales.view(len(matrix.scales), matrix.rows, -1)
    scale = pairs[..., :1].double().transpose(0, 1)  # [R, K / group, 1]
    steps = wide.unflatten(1, (-1, matrix.group)) / torch.where(scale != 0, scale, 1.0)
    return (steps.round() * scale).flatten(1)


def _zeros(matrix: Matrix) -> Tensor | None:
    """What is added to every weight of a group, fp64 [K / group, R]; ``None`` for forms that have none."""
    if matrix.scales is None:
        return None
    if matrix.kind == "int4":
        return matrix.scales[..., 1].double()
    if matrix.kind == "grid4" and matrix.grid.zeros:
        pairs = matrix.scales.view(len(matrix.scales), -1, 2).double()
        return (8 - pairs[..., 1]) * pairs[..., 0]
    if matrix.kind in LOW_BITS:
        grid, _, z = low_bits.load(matrix.scales, LOW_BITS[matrix.kind])
        return grid.shifts(z).T.double()
    return None


def rounded(x: Tensor, matrix: Matrix) -> Tensor:
    """Activations [..., K] as they meet the weights of ``matrix``, in fp32."""
    if matrix.kind == "plain":
        return x.float()
    block = matrix.group if matrix.kind in ("int4", "grid4") else BLOCK
    columns = x.shape[-1]
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    most = blocks.abs().amax(-1, keepdim=True)
    factor = torch.where(most > 1e-30, 127.0 / most, 0.0)
    return ((blocks * factor).round() * (most / 127.0)).flatten(-2)[..., :columns]


def gated(
    up: Matrix,
    down: Matrix,
    x: Tensor,
    gate: ExpertGate | None = None,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """D gate(G x, U x) for x [t, H]: fp64 [t, H]. ``up`` has the rows of G and U as ``gate`` says."""
    how = gate or ExpertGate()
    rows = product(up, x.float()).float()
    if biases is not None:
        rows += biases[0].float()
    first, second = (rows[:, ::2], rows[:, 1::2]) if how.interleaved else rows.chunk(2, -1)
    if how.limit:
        first, second = first.clamp(max=how.limit), second.clamp(-how.limit, how.limit)
        inner = (second + 1) * first * torch.sigmoid(how.alpha * first)
    else:
        inner = silu(first) * second
    out = product(down, inner)
    return out if biases is None else out + biases[1].double()


def dense(gate: Matrix, up: Matrix, down: Matrix, share: Matrix | None, x: Tensor) -> Tensor:
    """D (silu(G x) * U x) for bf16 x [t, H], times sigmoid(share x) where there is one; every step rounded to bf16."""
    first, second = [product(one, x).to(x.dtype) for one in (gate, up)]
    out = product(down, silu(first) * second).to(x.dtype)
    return out if share is None else torch.sigmoid(product(share, x).to(x.dtype)) * out


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, plus_one: bool, early: bool) -> Tensor:
    """The norm of the last axis in the format of ``x``; arguments as of ``structs.RmsNorm``."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    if early:
        scaled = scaled.to(x.dtype).float()
    return (scaled * (weight.float() + int(plus_one))).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of [heads, width]: the first half of the turned numbers with the second, every step rounded."""
    count = cos.shape[-1]
    turned, rest = x[..., :count], x[..., count:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(q K^T * scaling) V in fp64: [heads, D], [groups, T, D], [groups, T, D'] -> [heads, D']."""
    each = len(query) // len(key)
    keys, values = [one.double().repeat_interleave(each, 0) for one in (key, value)]
    scores = torch.einsum("hd,htd->ht", query.double(), keys) * scaling
    return torch.einsum("ht,htd->hd", scores.softmax(-1), values)
