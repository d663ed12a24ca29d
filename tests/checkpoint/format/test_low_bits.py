"""Forms of few bits: where every number lies, what a grid stands for, what is looked for under weights of columns."""

from __future__ import annotations

import pytest
import torch

from conmoe_edge.checkpoint.format import low_bits
from conmoe_edge.checkpoint.format.forms import (
    LOW_BITS,
    Kind,
    best_kind,
    columns_of,
    kind_of,
    quantised_parts,
)
from conmoe_edge.checkpoint.format.layout import expert_width, make_layout
from conmoe_edge.checkpoint.format.quantise import quantise, stored
from conmoe_edge.checkpoint.format.record_check import RecordCheck
from conmoe_edge.checkpoint.format.records import decode, encode, pack, view

KINDS: tuple[Kind, ...] = ("q6", "q4", "q3", "q2")
SHAPES = ((16, 32), (48, 96), (64, 64), (160, 192), (1088, 320))
"""Tiles of 16, 32 and 64 rows; the last is quantised in several runs of rows."""


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_plain_loops(values: torch.Tensor, bits: int, tile: int, row: int, column: int) -> int:
    """The number of one weight, as the description of the layout has it."""
    bytes_ = values.flatten().tolist()
    columns = values.shape[1] * 8 // bits
    block = (row // tile) * (columns // 32) + column // 32
    place, found, shift = block * tile * 32 * bits // 8, 0, 0
    for plane in {6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,)}[bits]:
        of_a_word = 32 // plane
        word, inside = divmod(column % 32, of_a_word)
        byte = bytes_[place + (word * tile + row % tile) * 4 + inside % 4]
        found |= (byte >> (plane * (inside // 4)) & ((1 << plane) - 1)) << shift
        place += tile * 32 * plane // 8
        shift += plane
    return found


@pytest.mark.parametrize("bits", [6, 4, 3, 2])
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_every_number_lies_where_the_layout_says(bits: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (2 * tile, 96), generator=generator, dtype=torch.uint8)
    values = low_bits.pack(codes, bits, tile)
    assert values.shape == (2 * tile, 96 * bits // 8)
    assert torch.equal(low_bits.unpack(values, bits, tile), codes)
    for row in range(0, 2 * tile, 5):
        for column in range(96):
            assert by_plain_loops(values, bits, tile, row, column) == int(codes[row, column])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_stored_is_what_was_quantised(kind: Kind, rows: int, columns: int) -> None:
    weight = drawn(rows, columns)
    matrix = quantise(weight, kind)
    (_, shape, dtype), (_, scales, scale_dtype) = quantised_parts("w", rows, columns, kind)
    assert (tuple(matrix.values.shape), dtype) == (shape, "uint8")
    assert matrix.scales is not None
    assert (tuple(matrix.scales.shape), scale_dtype) == (scales, "uint8")
    assert kind_of((dtype, shape), (scale_dtype, scales)) == kind
    assert columns_of(kind, shape) == columns
    again = stored(kind, matrix.values, matrix.scales)
    assert (again.rows, again.columns, again.group) == (rows, columns, 32)
    assert torch.equal(again.dequantise(), matrix.dequantise())
    bits = LOW_BITS[kind]
    assert matrix.nbytes * 8 == rows * columns * (bits + 0.25) + 32 * rows
    step = (weight.amax(1) - weight.amin(1)) / ((1 << bits) - 1)
    assert bool(((matrix.dequantise() - weight).abs().amax(1) <= 1.5 * step).all())


@pytest.mark.parametrize("kind", KINDS)
def test_expanding_is_the_formula(kind: Kind) -> None:
    bits, rows, columns = LOW_BITS[kind], 32, 64
    matrix = quantise(drawn(rows, columns), kind)
    assert matrix.scales is not None
    raw = matrix.scales.flatten().tolist()
    wide = matrix.dequantise()
    for row in range(rows):
        pair = torch.tensor(raw[4 * row : 4 * row + 4], dtype=torch.uint8).view(torch.bfloat16)
        for column in range(columns):
            byte = raw[4 * rows + column // 32 * rows + row]
            number = by_plain_loops(matrix.values, bits, matrix.tile, row, column)
            step, zero = float(pair[0]) * (byte & 15), float(pair[1]) * ((byte >> 4) - 8)
            wanted = (number - ((1 << bits) - 1) / 2) * step + zero
            assert float(wide[row, column]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_the_grid_come_back(kind: Kind) -> None:
    """What was rounded once is not changed by rounding again: the error of the second time is next to nothing."""
    once = quantise(drawn(64, 128), kind).dequantise()
    twice = quantise(once, kind).dequantise()
    assert float((twice - once).square().mean() / once.square().mean()) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_value_and_of_zeros(kind: Kind) -> None:
    weight = torch.zeros(16, 64)
    weight[1], weight[2, 5] = 0.75, 1.0
    wide = quantise(weight, kind).dequantise()
    assert torch.equal(wide[0], weight[0])
    torch.testing.assert_close(wide[1], weight[1], rtol=5e-3, atol=0)
    assert bool(wide.isfinite().all())


def test_fewer_bits_lose_more_and_none_more_than_int4_beyond_its_bytes() -> None:
    weight = drawn(256, 512)
    errors = {
        kind: float((quantise(weight, kind).dequantise() - weight).square().mean())
        for kind in ("int8", "int4", *KINDS)
    }
    assert (
        errors["int8"] < errors["q6"] < errors["q4"] < errors["int4"] < errors["q3"] < errors["q2"]
    )
    assert quantise(weight, "q4").nbytes < quantise(weight, "int4").nbytes


def test_a_column_that_counts_is_kept_nearer() -> None:
    weight, counts = drawn(1, 64, 32), torch.ones(1, 1, 32)
    counts[..., 7] = 200.0
    grid = low_bits.Grid.over(weight, 2)
    found = []
    for weights in (torch.ones(1, 1, 32), counts):
        s, z = grid.fit(weight, weights)
        error = (grid.values(grid.codes(weight, s, z), s, z) - weight).square()
        found.append((float(error[..., 7].mean()), float((error * weights).mean())))
    assert found[1][0] < 0.5 * found[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_record(kind: Kind) -> None:
    parts = (
        *quantised_parts("gate_up_proj", 128, 96, kind),
        *quantised_parts("down_proj", 96, 64, kind),
    )
    layout = make_layout(parts, kind)
    assert expert_width(layout) == 64
    weights = {"gate_up_proj": drawn(128, 96), "down_proj": drawn(96, 64, seed=1)}
    record = pack(layout, encode(layout, weights, transposed=False))
    back = decode(view(layout, record), torch.float32, transposed=False)
    for name, weight in weights.items():
        assert torch.equal(back[name], quantise(weight, kind).dequantise())


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_with_a_scale_that_is_no_number_is_found(kind: Kind) -> None:
    layout = make_layout(quantised_parts("down_proj", 96, 64, kind), kind)
    record = pack(layout, encode(layout, {"down_proj": drawn(96, 64)}, transposed=False))
    check = RecordCheck(layout)
    assert not check.wrong(record)
    view(layout, record)["down_proj.scale"].flatten()[190:192] = torch.tensor([0xC0, 0x7F])
    assert check.wrong(record) == "down_proj.scale holds NaN or infinity"


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_cannot_be_taken_are_int8(kind: Kind) -> None:
    assert best_kind(16, 32, kind) == kind
    assert best_kind(16, 48, kind) == best_kind(24, 32, kind) == "int8"
    with pytest.raises(ValueError, match=f"{kind} cannot take"):
        quantise(torch.zeros(16, 48), kind)


def test_scales_of_another_shape_are_no_form() -> None:
    values, scales = ("uint8", (64, 24)), ("uint8", (7, 64))
    assert kind_of(("uint8", (64, 32)), scales) is None  # 96 columns: 72, 48, 36 or 24 bytes
    assert kind_of(values, ("uint8", (7, 32))) is None
    assert kind_of(values, ("uint8", (4, 64))) is None
    assert kind_of(values, scales) == "q2"
