"""Weights in 6, 4, 3 or 2 bits with a byte of scales for 32 columns, and the way there and back.

A matrix [R, K] (rows are outputs), K a multiple of 32, R of 16. A weight is ``S s (q - c) + Z (z - 8)``: q in
0..2^bits - 1 and its middle c = (2^bits - 1) / 2; s and z in 0..15, one pair for a row in a group of 32 columns; S
and Z in bf16, one pair for a row. So scales cost 0.25 bits a weight, and 32 / K more. Scales of scales are those of
llama.cpp's K-quants; four bits for each do for small groups.

Values: uint8 [R, K bits / 8]. Rows are taken ``tile`` at a time (64, or 32 or 16 where 64 does not divide the rows),
and columns 32 at a time. The numbers of such a block lie in planes of 4, 2 or 1 bits: 6 bits are a plane of the lower
four and one of the upper two, 3 bits one of the lower two and one of the upper one. Of a plane with p bits a word of
32 bits has 32 / p columns of a row. Its byte b has, p bits each from the lowest on, the columns b, 4 + b, 8 + b, ...;
words of the tile's rows lie one after another, and behind them those of the next columns. So ``word >> p j & mask`` is
four neighbouring columns of a row in four bytes, and a vector is that of 8 or 16 rows, which is what the products of
bytes that processors have want.

Scales: uint8 [4 + K / 32, R]. The first four rows are R pairs (S, Z) in bf16, one after another; then one byte
``s | z << 4`` for each row, group by group.

Rounding here is to the nearest of a grid that is looked for under weights of columns; ``compress/solvers`` has the way
that makes up for it. Everything is deterministic. Peak memory: a dozen fp32 copies of the columns worked on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import LOW_GROUP as GROUP
from conmoe_edge.checkpoint.format.forms import LOW_HEAD as HEAD
from conmoe_edge.checkpoint.format.grid_search import best_line

PLANES = {6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,)}
"""Bits of a number -> bits of its planes, the lower ones first."""

_STEPS, _MIDDLE, _REACH = 15, 8, 7
"""Largest s; the z that stands for 0; the largest z above it that S and Z are chosen for."""
_CLIPS = {
    6: (1.0, 1.05, 1.1, 1.2),
    4: (1.0, 0.95, 0.9, 0.85),
    3: (1.0, 0.9, 0.8, 0.7),
    2: (1.0, 0.9, 0.8, 0.7, 0.6),
}
"""Shares of a group's range that are tried: outliers are clipped, all else is finer."""


_GROUPS = 4
"""Groups that are rounded to the nearest at a time."""


def pack(codes: Tensor, bits: int, tile: int) -> Tensor:
    """uint8 [R, K] numbers of ``bits`` bits -> values uint8 [R, K bits / 8]."""
    rows, columns = codes.shape
    blocks = codes.view(rows // tile, tile, columns // GROUP, GROUP).transpose(1, 2)
    planes, shift = [], 0
    for plane in PLANES[bits]:
        part = (blocks >> shift) & ((1 << plane) - 1)
        inside = 8 // plane  # numbers in a byte; columns of a word are 4 * inside
        words = part.unflatten(-1, (-1, inside, 4)).transpose(2, 3)  # [T, G, h, tile, j, b]
        bytes_ = torch.zeros_like(words[..., 0, :])
        for j in range(inside):
            bytes_ |= words[..., j, :] << (plane * j)
        planes.append(bytes_.flatten(2))
        shift += plane
    return torch.cat(planes, 2).reshape(rows, columns * bits // 8)


def unpack(values: Tensor, bits: int, tile: int) -> Tensor:
    """The inverse of ``pack``: uint8 [R, K]."""
    rows, columns = values.shape[0], values.shape[1] * 8 // bits
    blocks = values.view(rows // tile, columns // GROUP, tile * GROUP * bits // 8)
    found = torch.zeros(
        rows // tile, columns // GROUP, tile, GROUP, dtype=torch.uint8, device=values.device
    )
    start = shift = 0
    for plane in PLANES[bits]:
        inside, stop = 8 // plane, start + tile * GROUP * plane // 8
        bytes_ = blocks[..., start:stop].unflatten(2, (-1, tile, 4))  # [T, G, h, tile, b]
        numbers = [(bytes_ >> (plane * j)) & ((1 << plane) - 1) for j in range(inside)]
        words = torch.stack(numbers, 4).transpose(2, 3)  # [T, G, tile, h, j, b]
        found |= words.flatten(3) << shift
        start, shift = stop, shift + plane
    return found.transpose(1, 2).reshape(rows, columns)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the weights of some rows may lie: S and Z of each row, fp32 [..., R, 1], rounded to bf16."""

    bits: int
    scale: Tensor
    zero: Tensor

    @classmethod
    def over(cls, weight: Tensor, bits: int) -> Grid:
        """For ``weight`` [..., R, K]: wide enough for every group of a row."""
        grouped = weight.unflatten(-1, (-1, GROUP))
        low, high = grouped.amin(-1), grouped.amax(-1)  # [..., R, G]
        widest = (high - low).amax(-1, keepdim=True) / ((1 << bits) - 1)
        furthest = ((high + low) / 2).abs().amax(-1, keepdim=True)
        return cls(bits, _bf16(widest / _STEPS), _bf16(furthest / _REACH))

    @property
    def middle(self) -> float:
        """c."""
        return ((1 << self.bits) - 1) / 2

    def fit(self, group: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """s and z, whole numbers in fp32 [..., R, 1], for the weights ``group`` [..., R, 32] of one group, errors
        weighted with ``weights`` [..., 1, 32].
        """
        s, z = fit_columns(self, group.mT, weights.mT)
        return s.mT, z.mT

    def codes(self, weight: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """The numbers q, fp32, that come closest to ``weight`` [..., R, any]."""
        return self._levels(weight, s * self.scale, self.shifts(z)) + self.middle

    def values(self, codes: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """The weights that numbers stand for."""
        return (codes - self.middle) * (s * self.scale) + self.shifts(z)

    def shifts(self, z: Tensor) -> Tensor:
        """What is added to every weight of a group."""
        return self.zero * (z - _MIDDLE)

    def _levels(self, weight: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        """q - c."""
        inverse = torch.where(step != 0, 1.0 / step, 0.0)
        codes = ((weight - zero) * inverse + self.middle).round_().clamp_(0, 2 * self.middle)
        return codes - self.middle


def fit_columns(grid: Grid, group: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``Grid.fit`` with rows along the last axis, where it is several times faster: s and z [..., 1, R] for ``group``
    [..., 32, R] and ``weights`` [..., 32, 1]. The best of several lines (``grid_search.py``).
    """
    scale, unit = grid.scale.mT, grid.zero.mT  # [..., 1, R]
    by_scale, by_unit = (torch.where(one > 0, 1.0 / one, 0.0) for one in (scale, unit))

    def snap(step: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
        s = (step * by_scale).round_().clamp_(0, _STEPS)
        z = (zero * by_unit).round_().add_(_MIDDLE).clamp_(0, _STEPS)
        return s * scale, unit * (z - _MIDDLE), s, z

    top = (1 << grid.bits) - 1
    if grid.bits == 6:
        return _widest_enough(group, weights, grid, snap)
    _, _, s, z = best_line(group, weights, _CLIPS[grid.bits], -grid.middle, top, snap)
    return s, z


def _widest_enough(
    group: Tensor, weights: Tensor, grid: Grid, snap: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor]:
    """``fit_columns`` for 6 bits, where rounding z moves a range by more than a number's step: the errors are those of
    what is stored in the end, with all that is clipped then.
    """
    top = (1 << grid.bits) - 1
    least, most = group.amin(-2, keepdim=True), group.amax(-2, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for share in _CLIPS[grid.bits]:
        step, zero, s, z = snap((most - least) * (share / top), (most + least) / 2)
        inverse = torch.where(step > 0, 1.0 / step, 0.0)
        levels = ((group - zero) * inverse + grid.middle).round_().clamp_(0, top) - grid.middle
        error = ((levels * step + zero - group).square_() * weights).sum(-2, keepdim=True)
        if best is None:
            best = error, s, z
        else:
            better = error < best[0]
            found = zip((error, s, z), best, strict=True)
            best = tuple(torch.where(better, one, other) for one, other in found)  # pyright: ignore[reportAssignmentType]
    assert best is not None
    return best[1], best[2]


def store(grid: Grid, codes: Tensor, s: Tensor, z: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Values and scales of one matrix: ``codes`` [R, K], ``s`` and ``z`` [R, G], whole numbers of any type."""
    pairs = torch.cat([grid.scale, grid.zero], 1).to(torch.bfloat16).contiguous()  # [R, 2]
    head = pairs.view(torch.uint8).view(HEAD, -1)
    tail = (s.to(torch.uint8) | (z.to(torch.uint8) << 4)).T
    return pack(codes.to(torch.uint8), grid.bits, tile), torch.cat([head, tail])


def load(scales: Tensor, bits: int) -> tuple[Grid, Tensor, Tensor]:
    """The grid, and s and z fp32 [R, G], of stored scales."""
    pairs = units(scales).float()  # [R, 2]
    tail = scales[HEAD:].T
    return Grid(bits, pairs[:, :1], pairs[:, 1:]), (tail & 15).float(), (tail >> 4).float()


def expand(values: Tensor, scales: Tensor, bits: int, tile: int) -> Tensor:
    """fp32 [R, K]."""
    grid, s, z = load(scales, bits)
    wide = unpack(values, bits, tile).float().unflatten(1, (-1, GROUP))  # [R, G, 32]
    step, zero = (s * grid.scale).unsqueeze(2), grid.shifts(z).unsqueeze(2)
    return wide.sub_(grid.middle).mul_(step).add_(zero).flatten(1)


def round_to(weight: Tensor, bits: int, tile: int) -> tuple[Tensor, Tensor]:
    """Values and scales of ``weight`` [R, K], every number for itself, all columns alike."""
    wide = weight.float()
    grid, groups = Grid.over(wide, bits), wide.shape[1] // GROUP
    alike = torch.ones(1, GROUP, 1, device=wide.device, dtype=torch.float32)
    found = []
    for start in range(0, groups, _GROUPS):  # few enough to stay in a processor's cache
        some = wide[:, start * GROUP : (start + _GROUPS) * GROUP].unflatten(1, (-1, GROUP))
        columns = some.permute(1, 2, 0).contiguous()  # [g, 32, R]
        s, z = fit_columns(grid, columns, alike)
        codes = columns_codes(grid, columns, s, z)
        found.append((codes, s.squeeze(1), z.squeeze(1)))
    codes, s, z = (torch.cat(one) for one in zip(*found, strict=True))
    return store(grid, codes.flatten(0, 1).T.contiguous(), s.T, z.T, tile)


def columns_codes(grid: Grid, group: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """uint8: ``Grid.codes`` with rows along the last axis; arguments as ``fit_columns`` takes and gives them."""
    across = Grid(grid.bits, grid.scale.mT, grid.zero.mT)
    return across.codes(group, s, z).to(torch.uint8)


def units(scales: Tensor) -> Tensor:
    """S and Z of stored scales: bf16 [R, 2]."""
    return scales[:HEAD].contiguous().view(-1, HEAD).view(torch.bfloat16)


def rows_of(scales: Tensor, rows: slice) -> Tensor:
    """The stored scales of a run of rows."""
    head = scales[:HEAD].contiguous().view(-1, HEAD)[rows].contiguous()
    return torch.cat([head.view(HEAD, -1), scales[HEAD:, rows]])


def picked(
    values: Tensor, scales: Tensor, bits: int, tile: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Values and scales of single rows, int64 [n] of a matrix in tiles of ``tile``, as a matrix in tiles of one."""
    groups = values.shape[1] * 8 // (bits * GROUP)
    # A group of a row is as many words of 32 bits as a number has bits, whatever its planes.
    blocks = values.view(-1, groups, bits, tile, 4)
    words = blocks[rows // tile, :, :, rows % tile]  # [n, G, bits, 4]
    head = scales[:HEAD].contiguous().view(-1, HEAD)[rows].contiguous()
    return words.flatten(1), torch.cat([head.view(HEAD, -1), scales[HEAD:, rows]])


def one_row(values: Tensor, scales: Tensor, bits: int, tile: int, row: int) -> Tensor:
    """fp32 [1, K]: the bits of ``expand`` of what is ``picked``, for a single row of a matrix on the CPU. By numpy, as
    this is done for every token and one operation of torch takes as long as all of these.
    """
    wide, count = values.numpy(), scales.shape[1]
    groups = wide.shape[1] * 8 // (bits * GROUP)
    words = wide.reshape(-1, groups, bits, tile, 4)[row // tile, :, :, row % tile]  # [G, bits, 4]
    codes, start, low = np.zeros((groups, GROUP), np.uint8), 0, 0
    for plane in PLANES[bits]:
        inside = np.arange(0, 8, plane, dtype=np.uint8)[:, None]
        part = words[:, start : start + plane, None] >> inside & np.uint8((1 << plane) - 1)
        codes |= part.reshape(groups, GROUP) << np.uint8(low)
        start, low = start + plane, low + plane
    packed = scales.numpy()
    pair = packed[:HEAD].reshape(count, HEAD)[row].view(np.uint16).astype(np.uint32) << 16
    scale, zero = pair.view(np.float32)
    tail = packed[HEAD:, row]
    step = (tail & np.uint8(15)).astype(np.float32) * scale
    shift = zero * ((tail >> np.uint8(4)).astype(np.float32) - np.float32(_MIDDLE))
    found = codes.astype(np.float32)
    found -= np.float32(((1 << bits) - 1) / 2)
    found *= step[:, None]
    found += shift[:, None]
    return torch.from_numpy(found.reshape(1, -1))


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Values and scales of runs of rows as those of the whole."""
    if len(parts) == 1:
        return parts[0]
    heads = [scales[:HEAD].contiguous().view(-1, HEAD) for _, scales in parts]
    tails = torch.cat([scales[HEAD:] for _, scales in parts], 1)
    return torch.cat([values for values, _ in parts]), torch.cat(
        [torch.cat(heads).view(HEAD, -1), tails]
    )


def _bf16(value: Tensor) -> Tensor:
    return value.to(torch.bfloat16).float()
