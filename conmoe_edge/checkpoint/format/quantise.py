"""The stored forms of a weight matrix [rows, columns] (rows are outputs), and the way there and back.

========  ==================================================  ==================================================
kind      values                                              scales
========  ==================================================  ==================================================
plain     [R, K] in a floating-point format                   none
int8      int8 [R, K]                                         bf16 [R]: value = q * scale
int4      uint8 [R, K // 2], two numbers a byte, in tiles     bf16 [K // group, R, 2], pairs (scale, zero):
          (below)                                             value = (q - 8) * scale + zero, q in 0..15
grid4     as of int4                                          fp16 or bf16 [K // group, R], or [K // group, 2 R] in
                                                              pairs (scale, zero point); see ``grids.py``
mxfp4     uint8 [R, K // 2], two E2M1 numbers a byte, in      E8M0 [K // 32, R]: value = number * 2^(scale - 127)
          tiles
q6 q4 q3  uint8 [R, K bits // 8], see ``low_bits.py``         uint8 [K // 32 + 4, R]
q2
========  ==================================================  ==================================================

Tiles of int4, grid4, mxfp4: rows are taken ``tile`` at a time (64, or 32 or 16 where 64 does not divide the rows). A
tile is one run of bytes: for each column its ``tile / 2`` bytes, of which the low half-byte belongs to the tile's first
``tile / 2`` rows and the high one to the others. So one load brings many rows of one column, which is how vector units
like it; with 64 rows it is also the order that torch's own 4-bit kernel reads on processors with AVX-512, so a package
needs no repacking there. Everywhere else the form is plain enough to be expanded.

Scales and zeros are rounded to bf16 *before* the numbers are rounded to them, so that a kernel which works in bf16 and
one which works in fp32 see the same weights. Rounding is to the nearest; int4 fits its two parameters to each group by
least squares. Everything is deterministic.

mxfp4 is the form of the OCP Microscaling specification 1.0, in which some models are published: a sign and one of 0,
0.5, 1, 1.5, 2, 3, 4, 6, and a power of two for 32 columns. The scale is 2^(floor(log2(largest)) - 2), the least 2^-127,
numbers go to the nearest, ties to the even code, and what is above 6 becomes 6. So weights that came from mxfp4 become
the same weights again, whatever their scales were, as long as the format they came in holds them: bf16 and fp32 do for
every scale up to 2^125, and beyond it for numbers that stay below 2^128. A block that holds NaN or infinity gets the
scale NaN, which no reader takes (``record_check.py``). Post hoc it is the worst form for other weights.

Peak memory: the result and a few megabytes for the block of rows that is worked on. Raises ``ValueError``
for a matrix that a kind cannot take (``best_kind`` says which it can), a mistake of the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format import grids, low_bits
from conmoe_edge.checkpoint.format.forms import (
    LOW_BITS,
    LOW_GROUP,
    MX_BLOCK,
    TILES,
    Grid,
    Kind,
    best_kind,
    columns_of,
    first_divisor,
    grid_of,
    group_of,
    in_tiles,
)

_SHRINK = 0.96
"""The first guess of a group's range, as a share of the widest: outliers are clipped a little, all else is finer."""

_BLOCK = 1 << 18
"""Numbers that are worked on at a time, so that the passes over them stay in the processor's cache."""
_LOW_BLOCK = 1 << 21
"""The same for few bits, where ``low_bits`` takes a few groups of columns at a time."""


_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1: tuple[float, ...] = (*_SIZES, *(-one for one in _SIZES))
"""The number of each code of E2M1."""
_E8M0_NAN = 255


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix in a stored form; the tensors are views of whatever holds them."""

    kind: Kind
    values: Tensor
    scales: Tensor | None
    rows: int
    columns: int
    group: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        held = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return self.values.numel() * self.values.element_size() + held

    def dequantise(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The weights [R, K] in ``dtype``; a plain matrix in that format is given as it is, without ``out``."""
        if self.kind == "plain":
            return self.values.to(dtype) if out is None else out.copy_(self.values)
        assert self.scales is not None
        if out is None:
            out = torch.empty(self.rows, self.columns, dtype=dtype, device=self.values.device)
        for block in _blocks(self.rows, self.columns):
            if self.kind == "int8":
                wide = self.values[block].float().mul_(self.scales[block].float().unsqueeze(1))
            elif self.kind == "mxfp4":
                wide = _expand_mxfp4(
                    self.values[block], self.scales.view(torch.uint8)[:, block], self.tile
                )
            elif self.kind == "grid4":
                part = grids.rows_of(self.scales, block, self.rows)
                wide = grids.expand(_unpack(self.values[block], self.tile), part, self.grid)
            elif self.kind in LOW_BITS:
                scales = low_bits.rows_of(self.scales, block)
                wide = low_bits.expand(self.values[block], scales, LOW_BITS[self.kind], self.tile)
            else:
                wide = _expand_int4(
                    self.values[block], self.scales[:, block], self.group, self.tile
                )
            out[block] = wide
        return out

    def part(self, rows: slice) -> Matrix:
        """A run of rows, whole tiles of forms that have them.

        Raises:
            ValueError: the run cuts a tile, or would have others.
        """
        start, stop, _ = rows.indices(self.rows)
        part = Matrix(
            self.kind, self.values[rows], self.scales, stop - start, self.columns, self.group
        )
        if in_tiles(self.kind) and (start % self.tile or part.tile != self.tile):
            raise ValueError(f"rows {start} to {stop} are no whole tiles of {self.tile}")
        if self.scales is None:
            return part
        scales = self.scales[rows] if self.kind == "int8" else self.scales[:, rows]
        if self.kind in LOW_BITS:
            scales = low_bits.rows_of(self.scales, rows)
        elif self.kind == "grid4":
            scales = grids.rows_of(self.scales, rows, self.rows)
        return replace(part, scales=scales)

    def look_up(self, rows: Tensor) -> Tensor:
        """Single rows, by their numbers int64 [n]: fp32 [n, K]. Int8 and the forms of ``low_bits.py``.

        Raises:
            IndexError: a number that no row has.
        """
        assert self.scales is not None
        bits = LOW_BITS.get(self.kind)
        if len(rows) == 1 and bits is not None and self.values.is_cpu:
            row = int(rows)
            self._check_rows(row, row)
            return low_bits.one_row(self.values, self.scales, bits, self.tile, row)
        if len(rows):
            self._check_rows(int(rows.min()), int(rows.max()))
        if bits is None:
            return self.values[rows].float().mul_(self.scales[rows].float().unsqueeze(1))
        values, scales = low_bits.picked(self.values, self.scales, bits, self.tile, rows)
        return low_bits.expand(values, scales, bits, 1)

    def _check_rows(self, least: int, most: int) -> None:
        if not 0 <= least <= most < self.rows:
            raise IndexError(f"a row of {self.rows} that is not there: from {least} to {most}")

    @property
    def tile(self) -> int:
        """Rows of a tile of a form that has them."""
        return first_divisor(TILES, self.rows)

    @property
    def grid(self) -> Grid:
        """Of a matrix in grid4."""
        assert self.scales is not None
        formats = [
            (str(one.dtype).removeprefix("torch."), one.shape) for one in (self.values, self.scales)
        ]
        found = grid_of(*formats)
        assert found is not None, "its kind says that it has one"
        return found


def quantise(weight: Tensor, kind: Kind, grid: Grid | None = None) -> Matrix:
    """``weight`` [R, K] (rows are outputs) in a stored form; ``grid`` is that of grid4.

    Raises:
        ValueError: the form cannot take this shape.
    """
    rows, columns = weight.shape
    if kind == "plain":
        return Matrix(kind, weight, None, rows, columns)
    weight = weight.detach()
    if kind == "int8":
        values, scales = _int8(weight)
        return Matrix(kind, values, scales, rows, columns)
    if best_kind(rows, columns, kind) != kind:
        raise ValueError(f"{kind} cannot take a matrix of {rows} rows and {columns} columns")
    if kind == "grid4":
        if grid is None or not grid.takes(rows, columns):
            raise ValueError(f"{grid} cannot take a matrix of {rows} rows and {columns} columns")
        values, scales = _grid4(weight, grid)
        return Matrix(kind, values, scales, rows, columns, grid.group)
    if kind == "mxfp4":
        values, scales = _mxfp4(weight)
        return Matrix(kind, values, scales, rows, columns, MX_BLOCK)
    if kind in LOW_BITS:
        tile = first_divisor(TILES, rows)
        parts = [
            low_bits.round_to(weight[block], LOW_BITS[kind], tile)
            for block in _blocks(rows, columns, _LOW_BLOCK)
        ]
        values, scales = low_bits.joined(parts)
        return Matrix(kind, values, scales, rows, columns, LOW_GROUP)
    group = group_of(columns)
    values, scales = _int4(weight, group)
    return Matrix(kind, values, scales, rows, columns, group)


def stored(kind: Kind, values: Tensor, scales: Tensor | None) -> Matrix:
    """A matrix from the tensors of its stored form."""
    rows, columns = values.shape
    if kind == "plain" or scales is None:
        return Matrix("plain", values, None, rows, columns)
    columns, group = columns_of(kind, values.shape), 0
    if kind in LOW_BITS:
        group = LOW_GROUP
    elif kind != "int8":
        group = columns // scales.shape[0]
    return Matrix(kind, values, scales, rows, columns, group)


def _blocks(rows: int, columns: int, most: int = _BLOCK) -> list[slice]:
    """Runs of rows, whole tiles each, of about ``most`` numbers."""
    step = max(1, most // columns // TILES[0]) * TILES[0]
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
    for block in _blocks(*weight.shape):
        rows = weight[block].float()
        scale = row_scales(rows)  # [r]
        wide = scale.float().unsqueeze(1)
        values[block] = torch.where(wide > 0, rows / wide, 0.0).round_().clamp_(-127, 127)
        scales[block] = scale
    return values, scales


def row_scales(weight: Tensor) -> Tensor:
    """bf16 [..., R] for weights fp32 [..., R, K]; rounded up, so that the largest number of a row is never clipped."""
    return _up_to_bf16(weight.abs().amax(-1) / 127)


def int8_matrix(numbers: Tensor, scales: Tensor) -> Matrix:
    """From int8 [R, K] and bf16 [R]."""
    return Matrix("int8", numbers.contiguous(), scales, *numbers.shape)


def int4_matrix(numbers: Tensor, pairs: Tensor) -> Matrix:
    """From numbers 0..15, uint8 [R, K], and their (scale, zero) [G, R, 2], which are bf16 numbers already."""
    rows, columns = numbers.shape
    values = _pack(numbers.contiguous(), first_divisor(TILES, rows))
    return Matrix("int4", values, pairs.to(torch.bfloat16), rows, columns, group_of(columns))


def _up_to_bf16(value: Tensor) -> Tensor:
    near = value.to(torch.bfloat16)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() < value, above, near)


def _int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(columns // group, rows, 2, dtype=torch.bfloat16, device=weight.device)
    tile = first_divisor(TILES, rows)
    for block in _blocks(rows, columns):
        number, pairs = _int4_rows(weight[block].float(), group)
        packed[block] = _pack(number, tile)
        scales[:, block] = pairs.transpose(0, 1)
    return packed, scales


def _int4_rows(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Numbers uint8 [r, K] and (scale, zero) bf16 [r, G, 2] of a block of rows."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, columns // group, group)  # [r, G, g]
    # Two passes: torch's aminmax over so short an axis takes five times as long as both together.
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)  # [r, G, 1]
    step = (high - low) * (_SHRINK / 15)
    number = _nearest(grouped, step, (low + high + step) / 2)
    # With the numbers given, weights lie about a straight line over them: least squares.
    mean = number.mean(2, keepdim=True)
    centred = number - mean
    spread = centred.square().sum(2, keepdim=True)
    slope = torch.where(spread > 0, (centred * grouped).sum(2, keepdim=True) / spread, step)
    zero = grouped.mean(2, keepdim=True) - slope * (mean - 8)
    pairs = torch.cat([slope, zero], 2).to(torch.bfloat16)
    wide = pairs.float()
    number = _nearest(grouped, wide[..., :1], wide[..., 1:])
    return number.to(torch.uint8).view(rows, columns), pairs


def _nearest(grouped: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """The numbers 0..15 that come closest; 8 where a group has a single value."""
    inverse = torch.where(step != 0, 1.0 / step, 0.0)
    return ((grouped - zero) * inverse).round_().add_(8).clamp_(0, 15)


def _grid4(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    tile, parts = first_divisor(TILES, rows), []
    for block in _blocks(rows, columns):
        number, scales = grids.round_to(weight[block], grid)
        packed[block] = _pack(number, tile)
        parts.append(scales)
    return packed, torch.cat(parts, 1)


def _mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(columns // MX_BLOCK, rows, dtype=torch.uint8, device=weight.device)
    tile = first_divisor(TILES, rows)
    for block in _blocks(rows, columns):
        part = weight[block]
        found = _mxfp4_bf16(part) if weight.dtype == torch.bfloat16 else None
        codes, exponents = _mxfp4_rows(part.float()) if found is None else found
        packed[block] = _pack(codes, tile)
        scales[:, block] = exponents.T
    return packed, scales.view(torch.float8_e8m0fnu)


def _mxfp4_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [r, K] and scales uint8 [r, K / 32] of a block of rows."""
    grouped = weight.unflatten(1, (-1, MX_BLOCK))
    largest = grouped.abs().amax(2)  # [r, K / 32]
    # frexp gives largest = m * 2^e with m in [0.5, 1), so floor(log2) is e - 1.
    exponent = (torch.frexp(largest)[1] - 3).clamp_(-127, 127)
    exponent = torch.where(largest > 0, exponent, -127)
    # Two steps: a scale of 2^-127 and its inverse are not both numbers that all processors multiply with alike.
    half = torch.div(-exponent, 2, rounding_mode="floor")
    first, second = power_of_two(half).unsqueeze(2), power_of_two(-exponent - half).unsqueeze(2)
    code = _e2m1((grouped * first * second).abs())
    code = code.nan_to_num_(0.0).to(torch.uint8) | (grouped.signbit().to(torch.uint8) << 3)
    scale = torch.where(largest.isfinite(), exponent + 127, _E8M0_NAN)
    return code.flatten(1), scale.to(torch.uint8)


def _e2m1(size: Tensor) -> Tensor:
    """The codes of numbers that are not negative: nearest, ties to the even one."""
    return torch.where(
        size < 2,
        (size * 2).round(),
        torch.where(size < 4, size.round() + 2, (size / 2).round() + 4),
    ).clamp_(max=7)


@cache
def _codes_of_bf16(device: torch.device) -> Tensor:
    """uint8: codes of the bf16 numbers from 2^-3 up to 8, by their bits; before them, that of all smaller ones."""
    size = torch.exp2(torch.arange(-3.0, 3.0)).unsqueeze(1) * (1 + torch.arange(128) / 128)
    return torch.cat([torch.zeros(1), _e2m1(size.flatten())]).to(torch.uint8).to(device)


def _mxfp4_bf16(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """What ``_mxfp4_rows`` gives for a block of rows in bf16, in a third of the time: a number over a power of two is
    its bits less a multiple of 128. ``None`` for blocks with numbers that are not finite, or too small for that.
    """
    bits = weight.contiguous().view(torch.int16).unflatten(1, (-1, MX_BLOCK))
    size = bits & 0x7FFF
    largest = size.amax(2)  # as numbers, so as bits
    exponent = (largest >> 7) - 2
    # Numbers below the least normal one have no exponent; with a scale code from 3 on they are 0.
    if bool(((largest > 0) & ((exponent < 3) | (largest >= 0x7F80))).any()):
        return None
    table = _codes_of_bf16(weight.device)
    start = exponent.clamp(min=3) - 3  # the exponent of 2^-3 times the scale
    place = (size - (start << 7).unsqueeze(2)).clamp_(min=-1) + 1
    code = table.index_select(0, place.flatten().int()).view(size.shape)
    code |= ((bits >> 12) & 8).to(torch.uint8)
    return code.flatten(1), exponent.clamp(min=0).to(torch.uint8)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, for whole numbers of -127..127."""
    return ((exponent.int() + 127) << 23).clamp_(min=1 << 22).view(torch.float32)


def _expand_mxfp4(packed: Tensor, scales: Tensor, tile: int) -> Tensor:
    """Values uint8 [r, K / 2] and scales uint8 [K / 32, r] -> fp32 [r, K]."""
    codes = _unpack(packed, tile)
    table = torch.tensor(E2M1, device=packed.device)
    wide = table.index_select(0, codes.flatten().int()).view(codes.shape)
    exponents = scales.T.int()  # [r, K / 32]
    factor = power_of_two(exponents - 127)
    factor = torch.where(exponents == _E8M0_NAN, torch.nan, factor)
    return wide.unflatten(1, (-1, MX_BLOCK)).mul_(factor.unsqueeze(2)).flatten(1)


def _pack(number: Tensor, tile: int) -> Tensor:
    """uint8 [r, K] numbers 0..15 -> uint8 [r, K // 2] in tiles."""
    rows, columns = number.shape
    halves = number.view(rows // tile, 2, tile // 2, columns)
    pairs = halves[:, 0] | (halves[:, 1] << 4)  # [tiles, tile / 2, K]
    return pairs.transpose(1, 2).reshape(rows, columns // 2)


def _unpack(packed: Tensor, tile: int) -> Tensor:
    """The inverse of ``_pack``: uint8 [r, K]."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    pairs = packed.reshape(rows // tile, columns, tile // 2).transpose(1, 2)
    return torch.stack([pairs & 15, pairs >> 4], 1).view(rows, columns)


def _expand_int4(packed: Tensor, scales: Tensor, group: int, tile: int) -> Tensor:
    rows, columns = packed.shape[0], packed.shape[1] * 2
    wide = _unpack(packed, tile).float().sub_(8).view(rows, columns // group, group)
    pairs = scales.float().transpose(0, 1)  # [r, G, 2]
    return wide.mul_(pairs[..., :1]).add_(pairs[..., 1:]).view(rows, columns)
