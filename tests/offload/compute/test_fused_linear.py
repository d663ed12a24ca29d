"""Dense products in every way there is, against plain products of the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.checkpoint.format.quantise import quantise, stored
from conmoe_edge.offload.compute import fused_linear as dense
from conmoe_edge.offload.compute.fused_linear import DenseProducts, FusedLinear, into_one_place
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.kernels.cpu.reference import product

OLD = Machine("cpu", native_bf16=False)
NEW = Machine("cpu", native_bf16=True)


def products(machine: Machine, native: bool) -> DenseProducts:
    found = DenseProducts(machine, native=native)
    if native and found.operator is None:
        pytest.skip("this machine cannot compile the operator")
    return found


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("machine", [OLD, NEW])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "height"), [("int8", 96), ("q6", 192), ("q4", 192)])
def test_fewer_bits_are_the_dequantised_product(
    native, machine, rows, dtype, bias, kind, height, monkeypatch
) -> None:
    monkeypatch.setattr(dense, "DENSE_BLOCK_BYTES", 37 * 4 * 64)  # blocks that do not divide
    matrix = quantise(random(height, 64), kind)
    ways = products(machine, native)
    x = random(rows, 64, dtype=dtype, seed=1)
    offset = random(height, dtype=dtype, seed=2) if bias else None
    y = ways.apply(matrix, ways.prepare(matrix), x, offset)
    right = product(matrix, x) if native else x.double() @ matrix.dequantise(torch.float64).T
    right = right if offset is None else right + offset.double()
    assert y.dtype == dtype and y.shape == (rows, height)
    torch.testing.assert_close(
        y.double(), right, **({"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else LOOSE)
    )


LOOSE = {"rtol": 2**-7, "atol": 0.15}  # sums of 64 products of bf16 numbers that are about 8


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("machine", [OLD, NEW])
@pytest.mark.parametrize("rows", [1, 3, 15, 16, 40])
def test_bf16_is_no_worse_than_transformers_own(native, machine, rows, monkeypatch) -> None:
    monkeypatch.setattr(dense, "DENSE_BLOCK_BYTES", 37 * 4 * 64)
    weight, offset = random(96, 64), random(96, seed=2)
    ways = products(machine, native)
    matrix = stored("plain", weight, None)
    x = random(rows, 64, seed=1)
    y = ways.apply(matrix, ways.prepare(matrix), x, offset)
    own = nn.functional.linear(x, weight, offset)
    right = x.double() @ weight.double().T + offset.double()
    assert y.dtype == torch.bfloat16
    assert (y - right).abs().max() <= 1.05 * (own - right).abs().max() + 0.02
    torch.testing.assert_close(y.double(), right, **LOOSE)


@pytest.mark.parametrize("kind", ["int8", "q6", "q4", "q3", "q2"])
def test_rows_that_are_looked_up_are_those_of_the_whole(kind: Kind) -> None:
    matrix = quantise(random(192, 96, dtype=torch.float32), kind)
    rows = torch.tensor([0, 191, 63, 64, 5, 5, 130])
    assert torch.equal(matrix.look_up(rows), matrix.dequantise()[rows])
    for row in rows:
        assert torch.equal(matrix.look_up(row[None])[0], matrix.dequantise()[row])
    assert matrix.look_up(rows[:0]).shape == (0, 96)
    for wrong in (-1, 192):
        for some in ([0, wrong], [wrong]):
            with pytest.raises(IndexError):
                matrix.look_up(torch.tensor(some))


@pytest.mark.parametrize("kind", ["int8", "int4", "mxfp4", "q6", "q4"])
def test_a_run_of_rows_is_a_matrix(kind: Kind) -> None:
    matrix = quantise(random(192, 96, dtype=torch.float32), kind)
    part = matrix.part(slice(64, 192))
    assert torch.equal(part.dequantise(), matrix.dequantise()[64:])
    if kind != "int8":
        for start, stop in ((32, 96), (64, 96)):
            with pytest.raises(ValueError, match="no whole tiles"):
                matrix.part(slice(start, stop))


def test_fewer_rows_are_the_same_bits() -> None:
    """What a token gets does not depend on how many came with it, as long as they are few."""
    ways = products(OLD, native=True)
    for matrix in (stored("plain", random(96, 64), None), quantise(random(96, 64), "int8")):
        x = random(15, 64, seed=3)
        prepared = ways.prepare(matrix)
        together = ways.apply(matrix, prepared, x, None)
        alone = torch.cat([ways.apply(matrix, prepared, row, None) for row in x.split(1)])
        assert torch.equal(together, alone)


def test_another_format_than_the_weights_is_transformers_business() -> None:
    ways = products(OLD, native=False)
    matrix = stored("plain", random(96, 64, dtype=torch.float32), None)
    with pytest.raises(RuntimeError):
        ways.apply(matrix, None, random(20, 64), None)


def test_layer_follows_its_weights_when_they_move(monkeypatch) -> None:
    monkeypatch.setattr(dense, "ARENA_FROM_BYTES", 0)
    plain = [nn.Linear(64, 96, bias=bias).bfloat16() for bias in (True, False)]
    shared = nn.Linear(64, 96, bias=False).bfloat16()
    shared.weight = plain[1].weight
    ways = products(OLD, native=True)
    layers = [FusedLinear(one, ways) for one in (*plain, shared)]
    x = random(2, 3, 64, seed=1)
    before = [layer(x) for layer in layers]
    held = [layer.weight.data_ptr() for layer in layers]
    assert into_one_place(one.weight for one in layers) == 2 * 96 * 64 * 2  # the shared one once
    assert all(layer.weight.data_ptr() != old for layer, old in zip(layers, held, strict=True))
    assert layers[1].weight is layers[2].weight
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer(x), old) and layer(x).shape == (2, 3, 96)
    for layer in layers:
        with torch.no_grad():
            layer.weight.zero_()
        assert bool((layer(x) == (0 if layer.bias is None else layer.bias)).all())


def test_small_weights_get_memory_of_their_own() -> None:
    layer = FusedLinear(nn.Linear(64, 96).bfloat16(), products(OLD, native=False))
    x = random(2, 64)
    before, held = layer(x.bfloat16()), layer.weight.data_ptr()
    assert into_one_place([layer.weight]) == 0
    assert layer.weight.data_ptr() != held  # out of the file that it may be mapped from
    assert torch.equal(layer(x.bfloat16()), before)


@pytest.mark.gpu
def test_int8_on_a_gpu() -> None:
    matrix = quantise(random(96, 64).cuda(), "int8")
    ways = DenseProducts(Machine("cuda", native_bf16=True))
    for rows in (1, 40):
        x = random(rows, 64, seed=1).cuda()
        right = x.double() @ matrix.dequantise(torch.float64).T
        torch.testing.assert_close(ways.apply(matrix, None, x, None).double(), right, **LOOSE)
