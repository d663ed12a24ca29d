"""Which grids of 4-bit sources an int4 record holds bit for bit: symmetric ones with bf16 scales, for groups that its
own groups divide. Its encoder does not find them, since it fits scale and zero to the rounded weights anew.
"""

from __future__ import annotations

import pytest
import torch

from conmoe_edge.checkpoint.format.quantise import Matrix, _pack, quantise

ROWS, COLUMNS, MIDDLE = 128, 256, 8


def weights(
    group: int, dtype: torch.dtype, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers, scales, zero points, and the weights as compressed-tensors multiplies them."""
    drawn = torch.Generator().manual_seed(group)
    numbers = torch.randint(0, 16, (ROWS, COLUMNS), generator=drawn)
    scales = (torch.rand(ROWS, COLUMNS // group, generator=drawn) / 100 + 0.002).to(dtype)
    zeros = torch.full(scales.shape, MIDDLE)
    if not symmetric:
        zeros = torch.randint(0, 16, scales.shape, generator=drawn)
    steps = (numbers - zeros.repeat_interleave(group, 1)).to(dtype)
    return numbers, scales, zeros, steps * scales.repeat_interleave(group, 1)


def record(numbers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Matrix:
    """The numbers and scales themselves in a record, whose groups have 64 columns."""
    times = COLUMNS // 64 // scales.shape[1]
    scale = scales.float().repeat_interleave(times, 1)
    zero = (MIDDLE - zeros.float()).repeat_interleave(times, 1) * scale
    pairs = torch.stack([scale, zero], 2).to(torch.bfloat16).transpose(0, 1)
    return Matrix("int4", _pack(numbers.to(torch.uint8), 64), pairs, ROWS, COLUMNS, 64)


@pytest.mark.parametrize("group", [64, 128, COLUMNS])
def test_a_symmetric_grid_with_bf16_scales_is_held(group: int) -> None:
    numbers, scales, zeros, weight = weights(group, torch.bfloat16)
    assert torch.equal(record(numbers, scales, zeros).dequantise(torch.bfloat16), weight)


@pytest.mark.parametrize(("dtype", "symmetric"), [(torch.float16, True), (torch.bfloat16, False)])
def test_other_grids_are_not(dtype: torch.dtype, symmetric: bool) -> None:
    """fp16 scales and most zero points have more digits than the bf16 pairs of the record."""
    numbers, scales, zeros, weight = weights(128, dtype, symmetric)
    assert not torch.equal(record(numbers, scales, zeros).dequantise(dtype), weight)


def test_the_encoder_does_not_find_a_grid() -> None:
    weight = weights(64, torch.bfloat16)[3]
    assert not torch.equal(quantise(weight, "int4").dequantise(torch.bfloat16), weight)
