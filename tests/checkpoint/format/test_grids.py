"""grid4: the 4 bits that other tools have rounded weights to are found again, bit for bit, and other weights fitted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import Grid, best_kind, kind_of, quantised_parts
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.quantise import quantise, stored
from conmoe_edge.checkpoint.format.record_check import RecordCheck
from conmoe_edge.checkpoint.format.records import decode, encode, matrix_of, pack, view

ROWS, COLUMNS = 192, 256
_BITS = {2: torch.int16, 4: torch.int32}


def on_grid(grid: Grid, own: torch.dtype, seed: int = 0) -> Tensor:
    """Weights in ``own`` as the libraries multiply them, some scales below 0, some groups all 0 or with one step."""
    drawn = torch.Generator().manual_seed(seed)
    shape = (ROWS, COLUMNS // grid.group)
    scales = torch.rand(shape, generator=drawn) / 100 + 0.002
    scales = scales * torch.where(torch.rand(shape, generator=drawn) < 0.1, -1, 1)
    scales = scales.to(getattr(torch, grid.dtype))
    zeros = torch.randint(0, 16, shape, generator=drawn) if grid.zeros else torch.full(shape, 8)
    middle = zeros.repeat_interleave(grid.group, 1)
    spread = torch.randint(1, 6, shape, generator=drawn).repeat_interleave(grid.group, 1)
    steps = torch.randn(ROWS, COLUMNS, generator=drawn) * spread
    steps[0], steps[1] = 0, 3
    numbers = (steps.round() + middle).clamp(0, 15)
    wide = (numbers - middle) * scales.float().repeat_interleave(grid.group, 1)
    return wide.to(scales.dtype).to(own)


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    bits = _BITS[wanted.element_size()]
    assert torch.equal(found.contiguous().view(bits), wanted.contiguous().view(bits))


@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scales", ["float16", "bfloat16"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_a_grid_is_found_again(own: torch.dtype, scales: str, zeros: bool, group: int) -> None:
    grid = Grid(group, scales, zeros)
    weight = on_grid(grid, own)
    matrix = quantise(weight, "grid4", grid)
    assert_same_bits(matrix.dequantise(own), weight)
    assert matrix.nbytes == ROWS * (COLUMNS // 2 + COLUMNS // group * 2 * (1 + zeros))


def test_without_one_step_beside_0() -> None:
    """The weight nearest to 0 is two steps, and no other divides the rest."""
    grid = Grid(32, "float16", False)
    steps = torch.tensor([2.0, -3.0, 0.0, 7.0, -8.0, 5.0, -2.0, 3.0]).repeat(4).repeat(16, 1)
    for scale in (0.0031, 0.77, 6e-6):
        weight = (steps * torch.tensor(scale, dtype=torch.float16).float()).to(torch.float16)
        plain = torch.randint(-3, 4, (16, 32), generator=torch.Generator().manual_seed(1))
        both = torch.cat([weight, plain.to(torch.float16)])
        assert_same_bits(quantise(both, "grid4", grid).dequantise(torch.float16), both)


def test_rows_and_whole_groups_of_columns_can_be_taken() -> None:
    grid = Grid(32, "bfloat16", True)
    weight = on_grid(grid, torch.bfloat16)
    rows = weight[torch.arange(0, 192, 3)]
    assert_same_bits(quantise(rows, "grid4", grid).dequantise(torch.bfloat16), rows)
    columns = torch.cat([weight[:, 32:96], weight[:, 160:192]], 1)
    assert_same_bits(quantise(columns, "grid4", grid).dequantise(torch.bfloat16), columns)


@pytest.mark.parametrize("zeros", [False, True])
def test_other_weights_are_rounded_as_well_as_in_int4(zeros: bool) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) * 0.05 + 0.02

    def error(kind: str, grid: Grid | None = None) -> float:
        back = quantise(weight, kind, grid).dequantise()  # pyright: ignore[reportArgumentType]
        return float((back - weight).norm() / weight.norm())

    most = 1.05 if zeros else 1.4  # around 0 they are not: half a step more on one side
    assert error("grid4", Grid(64, "float16", zeros)) < most * error("int4")


def test_weights_that_are_all_alike_or_far_from_0() -> None:
    grid = Grid(64, "bfloat16", True)
    for weight in (torch.zeros(16, 64), torch.full((16, 64), -0.3), torch.rand(16, 64) + 900):
        back = quantise(weight, "grid4", grid).dequantise()
        assert back.isfinite().all()
        assert float((back - weight).abs().max()) <= float(weight.abs().max()) / 250


@pytest.mark.parametrize("zeros", [False, True])
def test_through_a_record(zeros: bool) -> None:
    grid = Grid(32, "float16", zeros)
    weight = on_grid(grid, torch.float16)
    parts = quantised_parts("down_proj", ROWS, COLUMNS, "grid4", grid)
    layout = make_layout(parts, "int4")
    record = pack(layout, encode(layout, {"down_proj": weight}, transposed=False))
    held = view(layout, record)
    assert matrix_of(held, "down_proj").kind == "grid4"
    assert_same_bits(decode(held, torch.float16, False)["down_proj"], weight)
    turned = encode(layout, {"down_proj": weight.T}, transposed=True)
    assert torch.equal(pack(layout, turned), record)
    check = RecordCheck(layout)
    assert check.wrong(record) == ""
    held["down_proj.scale"][0, 3] = torch.inf
    assert "NaN or infinity" in check.wrong(record)


def test_forms_are_told_apart_by_formats_and_shapes() -> None:
    values = ("uint8", (64, 64))
    assert kind_of(values, ("bfloat16", (2, 64, 2))) == "int4"
    for dtype in ("float16", "bfloat16"):
        assert kind_of(values, (dtype, (4, 64))) == kind_of(values, (dtype, (4, 128))) == "grid4"
    assert kind_of(values, ("float16", (4, 65))) is None
    assert kind_of(values, ("float16", (3, 64))) is None
    assert kind_of(values, ("float16", (16, 64))) is None  # groups of 8
    assert kind_of(values, ("float16", (4, 64, 2))) is None
    assert kind_of(values, ("float32", (4, 64))) is None
    assert best_kind(32, 48, "grid4") == "grid4"
    with pytest.raises(ValueError, match="cannot take"):
        quantise(torch.zeros(64, 48), "grid4", Grid(32, "float16", False))
    whole = quantise(torch.zeros(32, 64), "grid4", Grid(32, "float16", True))
    again = stored("grid4", whole.values, whole.scales)
    assert (again.rows, again.columns, again.group) == (32, 64, 32)
