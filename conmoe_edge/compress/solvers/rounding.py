"""Weights in 8 to 2 bits, each column making up for what those before it lost: codes and scales as records have them.

Peak memory: four fp32 copies of the matrices, four of the Gram matrices of their inputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format import low_bits
from conmoe_edge.checkpoint.format.forms import (
    LOW_BITS,
    LOW_GROUP,
    TILES,
    Kind,
    first_divisor,
    group_of,
)
from conmoe_edge.checkpoint.format.grid_search import best_line
from conmoe_edge.checkpoint.format.quantise import Matrix, int4_matrix, int8_matrix, row_scales
from conmoe_edge.compress.solvers.error_feedback import (
    Grid,
    Inputs,
    damped,
    round_with_feedback,
)

FED_BACK: frozenset[Kind] = frozenset({"int8", "int4", *LOW_BITS})
"""The forms that can be rounded with error feedback: all whose scales are looked for."""


def round_matrix(
    weight: Tensor, moments: Tensor, kind: Kind, common: Tensor | None = None
) -> Matrix:
    """``weight`` [R, K] in the form ``kind``, one of ``FED_BACK`` that takes its shape (``best_kind``).

    Args:
        weight: rows are outputs.
        moments: fp32 [K, K], the Gram matrix of the inputs that it is multiplied with.
        kind: the form.
        common: fp32 [K, K]; a share of it is added (``error_feedback.damped``).
    """
    return round_matrices(weight.unsqueeze(0), moments.unsqueeze(0), kind, common)[0]


def round_matrices(
    weight: Tensor, moments: Tensor, kind: Kind, common: Tensor | None = None
) -> list[Matrix]:
    """``round_matrix`` for each of ``weight`` [E, R, K] with its own of ``moments`` [E, K, K]."""
    return round_for(weight, inputs_of(moments, common), kind)


def inputs_of(moments: Tensor, common: Tensor | None = None) -> Inputs:
    """``moments`` [E, K, K] and ``common`` as of ``round_matrices``, where several matrices are rounded for them."""
    return Inputs(damped(moments, common))


def round_for(weight: Tensor, inputs: Inputs, kind: Kind) -> list[Matrix]:
    """``round_matrices`` for inputs that are there already."""
    wide = weight.float()
    grid = _grid(wide, kind)
    found = round_with_feedback(wide, inputs, grid)
    return [
        grid.matrix(place, codes, groups.argsort())
        for place, (codes, groups) in enumerate(zip(found.codes, found.groups, strict=True))
    ]


class _StoredGrid(Grid, Protocol):
    def matrix(self, place: int, codes: Tensor, asked: Tensor) -> Matrix:
        """The matrix number ``place`` from its numbers [K, R]; ``asked`` [G]: when each group was fitted."""
        ...


def _grid(weight: Tensor, kind: Kind) -> _StoredGrid:
    if kind in LOW_BITS:
        return _LowBits(weight, kind)
    if kind == "int4":
        return _Int4(weight)
    if kind == "int8":
        return _Int8(weight)
    raise ValueError(f"{kind} has no grid that is looked for")


class _LowBits:
    """q4, q3, q2."""

    group = LOW_GROUP

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        self._grid = low_bits.Grid.over(weight, LOW_BITS[kind])
        self._kind: Kind = kind
        self._s: list[Tensor] = []
        self._z: list[Tensor] = []
        self.low, self.top = -self._grid.middle, (1 << LOW_BITS[kind]) - 1

    def fit(self, columns: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        s, z = low_bits.fit_columns(self._grid, columns, counts)
        self._s.append(s.to(torch.uint8))
        self._z.append(z.to(torch.uint8))
        return s * self._grid.scale.mT, self._grid.shifts(z.mT).mT

    def matrix(self, place: int, codes: Tensor, asked: Tensor) -> Matrix:
        columns, rows = codes.shape
        s, z = (torch.cat([group[place] for group in one])[asked].T for one in (self._s, self._z))
        grid = low_bits.Grid(self._grid.bits, self._grid.scale[place], self._grid.zero[place])
        values, scales = low_bits.store(
            grid, codes.T.contiguous(), s, z, first_divisor(TILES, rows)
        )
        return Matrix(self._kind, values, scales, rows, columns, LOW_GROUP)


class _Int4:
    """A scale and a zero in bf16 for a group."""

    low, top = -8.0, 15
    _SHARES = (1.0, 0.95, 0.9, 0.85)

    def __init__(self, weight: Tensor) -> None:
        self.group = group_of(weight.shape[2])
        self._pairs: list[Tensor] = []

    def fit(self, columns: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        def snap(step: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
            return step.bfloat16().float(), zero.bfloat16().float()

        step, zero = best_line(columns, counts, self._SHARES, self.low, self.top, snap)
        self._pairs.append(torch.stack([step, zero], 3))
        return step, zero

    def matrix(self, place: int, codes: Tensor, asked: Tensor) -> Matrix:
        return int4_matrix(codes.T, torch.cat([pairs[place] for pairs in self._pairs])[asked])


class _Int8:
    """One scale for a row, so none is looked for."""

    low, top = -127.0, 254

    def __init__(self, weight: Tensor) -> None:
        self.group = weight.shape[2]
        self._scales = row_scales(weight)

    def fit(self, columns: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        step = self._scales.float().unsqueeze(1)
        return step, torch.zeros_like(step)

    def matrix(self, place: int, codes: Tensor, asked: Tensor) -> Matrix:
        return int8_matrix((codes.T.short() - 127).to(torch.int8), self._scales[place])
