"""The stored forms of a matrix: there and back, errors inside the bound of each, one order of bytes."""

from __future__ import annotations

import pytest
import torch

from conmoe_edge.checkpoint.format.quantise import best_kind, group_of, quantise, stored

SHAPES = [(64, 64), (128, 96), (96, 192), (80, 32), (16, 64), (640, 1024)]


def weights(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randn(rows, columns, generator=generator) * 0.02


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int8_is_within_half_a_step(rows: int, columns: int) -> None:
    weight = weights(rows, columns)
    matrix = quantise(weight, "int8")
    assert matrix.scales is not None
    step = matrix.scales.float().unsqueeze(1)
    assert matrix.values.dtype == torch.int8
    assert matrix.nbytes == rows * columns + 2 * rows
    assert ((matrix.dequantise() - weight).abs() <= step * 0.5001).all()
    assert (step <= weight.abs().amax(1, keepdim=True) / 127 * 1.01).all()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int4_by_plain_arithmetic(rows: int, columns: int) -> None:
    """Numbers are read out of the tiles by the rule of the module's docstring, in loops."""
    weight = weights(rows, columns)
    matrix = quantise(weight, "int4")
    group = group_of(columns)
    assert matrix.nbytes == rows * columns // 2 + rows * columns // group * 4
    tile = next(size for size in (64, 32, 16) if rows % size == 0)
    data = matrix.values.flatten().tolist()
    assert matrix.scales is not None
    scales = matrix.scales.float()
    wide = matrix.dequantise()
    generator = torch.Generator().manual_seed(1)
    for row, column in zip(
        torch.randint(rows, (200,), generator=generator).tolist(),
        torch.randint(columns, (200,), generator=generator).tolist(),
        strict=True,
    ):
        inside = row % tile
        byte = data[row // tile * tile * columns // 2 + column * tile // 2 + inside % (tile // 2)]
        number = byte >> 4 if inside >= tile // 2 else byte & 15
        scale, zero = scales[column // group, row].tolist()
        expected = torch.tensor(number - 8.0) * scale + zero
        assert wide[row, column].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_error_of_normal_weights(kind: str) -> None:
    """Relative squared errors of normally distributed weights: 1 in 10,000 at 8 bits, 8 in 1,000 at 4 (better than
    the 4-bit float of the same size, whose figure is 8.5)."""
    weight = weights(1024, 1024)
    error = (quantise(weight, kind).dequantise() - weight).square().mean() / weight.square().mean()
    assert 0 < error < {"int8": 1e-4, "int4": 8e-3}[kind]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_odd_values(kind: str) -> None:
    """Rows of zeros, of one value, and with an outlier give finite numbers near what they were."""
    weight = torch.zeros(64, 64)
    weight[1] = 0.5
    weight[2, 3] = 100.0
    weight[3] = -1e-30
    back = quantise(weight, kind).dequantise()
    assert torch.isfinite(back).all()
    assert (back[0] == 0).all()
    assert torch.allclose(back[1], weight[1], rtol=0.01)
    assert back[2, 3] == pytest.approx(100.0, rel=0.05)


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_the_stored_tensors_are_enough(kind: str) -> None:
    weight = weights(96, 192)
    first = quantise(weight, kind)
    again = stored(first.kind, first.values, first.scales)
    assert (again.rows, again.columns, again.group) == (96, 192, first.group)
    assert torch.equal(again.dequantise(), first.dequantise())
    out = torch.empty(96, 192, dtype=torch.bfloat16)
    assert again.dequantise(out=out) is out
    assert torch.equal(out, first.dequantise(torch.bfloat16))


def test_equal_weights_give_equal_bytes() -> None:
    first, again = (quantise(weights(640, 1024), "int4") for _ in range(2))
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.scales, again.scales)


def test_shapes_that_int4_cannot_take() -> None:
    assert best_kind(100, 64, "int4") == "int8"
    assert best_kind(64, 100, "int4") == "int8"
    assert best_kind(64, 64, "int4") == "int4"
    with pytest.raises(ValueError, match="int4 cannot take"):
        quantise(weights(100, 64), "int4")


def test_torch_reads_the_tiles() -> None:
    """On processors with AVX-512 torch's own 4-bit kernel takes the values and scales as they are."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("torch packs in another order here")
    weight = weights(128, 256)
    matrix = quantise(weight, "int4")
    hidden = torch.randn(3, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    got = torch.ops.aten._weight_int4pack_mm_for_cpu(
        hidden, matrix.values, matrix.group, matrix.scales
    )
    expected = hidden.float() @ matrix.dequantise().T
    assert torch.allclose(got.float(), expected, atol=0.01 * expected.abs().max().item())
