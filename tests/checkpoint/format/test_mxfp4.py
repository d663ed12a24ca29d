"""mxfp4: lossless on what came from it, nearest with ties to even on what did not, and what no reader takes."""

from __future__ import annotations

import pytest
import torch

from conmoe_edge.checkpoint.format.forms import best_kind, quantised_parts
from conmoe_edge.checkpoint.format.layout import expert_width, make_layout
from conmoe_edge.checkpoint.format.quantise import _mxfp4_bf16, quantise, stored
from conmoe_edge.checkpoint.format.record_check import RecordCheck
from conmoe_edge.checkpoint.format.records import decode, encode, pack, view
from conmoe_edge.offload.kernels.triton.gpu_tables import GpuForm

NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = torch.tensor([*NUMBERS, *[-one for one in NUMBERS]], dtype=torch.float64)


def expanded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """By the specification, in fp64: codes [r, K], scales [r, K / 32]."""
    factor = torch.pow(torch.tensor(2.0, dtype=torch.float64), scales.double() - 127)
    return (E2M1[codes.long()].unflatten(1, (-1, 32)) * factor.unsqueeze(2)).flatten(1)


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(found, wanted)
    assert torch.equal(found.signbit(), wanted.signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_scales_and_blocks_come_back(dtype: torch.dtype) -> None:
    """Every scale that bf16 holds, with blocks of each largest number and random ones: the same bits."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.full((32,), code) for code in range(16)]
    for top in range(8):  # blocks of small numbers alone, whose scales could be smaller
        small = torch.randint(0, top + 1, (32,), generator=generator)
        blocks.append(small + 8 * torch.randint(0, 2, (32,), generator=generator))
    blocks += list(torch.randint(0, 16, (40, 32), generator=generator))
    codes = torch.stack(blocks)
    codes = torch.cat([codes] * 253)
    scales = torch.arange(253).repeat_interleave(len(blocks)).unsqueeze(1)
    wide = expanded(codes, scales)
    held = wide.to(dtype)
    assert torch.equal(held.double(), wide)  # the format holds them
    matrix = quantise(held, "mxfp4")
    assert_same_bits(matrix.dequantise(dtype), held)
    assert_same_bits(stored("mxfp4", matrix.values, matrix.scales).dequantise(dtype), held)


def test_every_pair_of_bytes() -> None:
    """All 2^16 pairs of bytes, in blocks of eight of them, come back with scales that differ."""
    pairs = torch.arange(1 << 16)
    codes = torch.stack([(pairs >> shift) & 15 for shift in (0, 4, 8, 12)], 1).view(-1, 32)
    scales = torch.randint(0, 253, (len(codes), 1), generator=torch.Generator().manual_seed(1))
    held = expanded(codes, scales).bfloat16()
    assert_same_bits(quantise(held, "mxfp4").dequantise(torch.bfloat16), held)


def test_beyond_the_largest_scale_bf16_has_infinity() -> None:
    """Scales 2^126 and 2^127: numbers below 2^128 come back, others are infinite in bf16 already, and are told."""
    for scale, most in ((253, 3), (254, 2)):
        codes = torch.arange(16).remainder(most + 1).repeat(16, 2)
        held = expanded(codes, torch.full((16, 1), scale)).bfloat16()
        assert held.isfinite().all()
        assert_same_bits(quantise(held, "mxfp4").dequantise(torch.bfloat16), held)
        beyond = expanded(torch.full((16, 32), 7), torch.full((16, 1), scale)).bfloat16()
        assert beyond.isinf().all()
        scales = quantise(beyond, "mxfp4").scales
        assert scales is not None and (scales.view(torch.uint8) == 255).all()


def test_to_the_nearest_and_ties_to_even() -> None:
    """Against a search through all eight numbers, in a block whose scale is 1; above 6 is 6."""
    sizes = torch.cat([torch.arange(0, 6, 1 / 32), torch.tensor([6.0, 6.5, 7.0, 7.9])])
    sizes = torch.nn.functional.pad(sizes, (0, -len(sizes) % 31)).view(-1, 31)
    block = torch.cat([torch.full((len(sizes), 1), 6.0), sizes], 1)
    block = torch.nn.functional.pad(block, (0, 0, 0, -len(block) % 16))
    block[1::2] *= -1
    block[block.abs().amax(1) == 0] = 0.0
    back = quantise(block, "mxfp4").dequantise()
    for given, found in zip(block.flatten().tolist(), back.flatten().tolist(), strict=True):
        near = sorted(range(8), key=lambda i: (abs(NUMBERS[i] - abs(given)), i % 2))[0]
        assert abs(found) == NUMBERS[near], given


def test_bf16_by_its_bits_is_bf16_by_its_value() -> None:
    """Numbers of every size beside each other: the same codes and scales as by way of fp32."""
    generator = torch.Generator().manual_seed(4)
    bits = torch.randint(0, 0x7F80, (4096, 64), generator=generator)
    bits[::2] = bits[::2] % (12 << 7) + (torch.randint(0, 240, (2048, 1), generator=generator) << 7)
    bits[5::7, :40], bits[:16], bits[16:32] = 0, 0, bits[16:32] % 512
    weight = bits.clamp(max=0x7F7F).to(torch.int16).view(torch.bfloat16)
    weight = torch.where(torch.rand(weight.shape, generator=generator) < 0.5, weight, -weight)
    found, wanted = quantise(weight, "mxfp4"), quantise(weight.float(), "mxfp4")
    assert torch.equal(found.values, wanted.values)
    assert found.scales is not None and wanted.scales is not None
    scales = found.scales.view(torch.uint8)
    assert torch.equal(scales, wanted.scales.view(torch.uint8))
    assert scales.unique().numel() > 200 and found.values.unique().numel() == 256
    by_bits = [_mxfp4_bf16(part) is not None for part in weight.split(64)]
    assert any(by_bits) and not all(by_bits)


def test_zeros_and_the_least_numbers() -> None:
    weight = torch.zeros(16, 64)
    weight[1] = 2.0**-149
    weight[2, 3] = 2.0**-126
    back = quantise(weight, "mxfp4").dequantise()
    assert (back[0] == 0).all() and (back[1] == 0).all()
    assert back[2, 3] == 2.0**-126 and back[2].count_nonzero() == 1


def test_a_record_there_and_back() -> None:
    parts = [
        part
        for name, rows, columns in (("gate_up_proj", 128, 96), ("down_proj", 96, 64))
        for part in quantised_parts(name, rows, columns, "mxfp4")
    ]
    layout = make_layout(parts, "mxfp4")
    assert expert_width(layout) == expert_width(layout, transposed=True) == 64
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (128, 96), generator=generator)
    scales = torch.randint(100, 130, (128, 3), generator=generator)
    own = {
        "gate_up_proj": expanded(codes, scales).bfloat16().T,
        "down_proj": expanded(codes[:96, :64], scales[:96, :2]).bfloat16().T,
    }
    record = pack(layout, encode(layout, own, True))
    back = decode(view(layout, record), torch.bfloat16, True)
    for name, weight in own.items():
        assert_same_bits(back[name], weight)
    check = RecordCheck(layout)
    assert check.wrong(record) == ""
    assert GpuForm.of(layout) is None  # the kernels of a GPU would read it as int4
    place = next(part for part in layout.parts if part.name == "down_proj.scale")
    record[place.offset + 5] = 255
    assert check.wrong(record) == "down_proj.scale holds NaN"


def test_shapes_that_mxfp4_cannot_take_stay_plain() -> None:
    assert best_kind(64, 96, "mxfp4") == "mxfp4"
    assert best_kind(64, 48, "mxfp4") == "plain"
    assert best_kind(40, 64, "mxfp4") == "plain"
    with pytest.raises(ValueError, match="mxfp4 cannot take"):
        quantise(torch.zeros(64, 48), "mxfp4")
