"""Weights in few bits, each column making up for what those before it lost: codes and scales as records have them.

Peak memory: six fp32 copies of the matrix, four of the Gram matrix of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format import low_bits
from conmoe_edge.checkpoint.format.forms import LOW_BITS, LOW_GROUP, TILES, Kind, first_divisor
from conmoe_edge.checkpoint.format.quantise import Matrix
from conmoe_edge.compress.solvers.error_feedback import damped, round_with_feedback


def round_matrix(
    weight: Tensor, moments: Tensor, kind: Kind, common: Tensor | None = None
) -> Matrix:
    """``weight`` [R, K] in the form ``kind``, one of ``LOW_BITS`` that takes its shape (``best_kind``).

    Args:
        weight: rows are outputs.
        moments: fp32 [K, K], the Gram matrix of the inputs that it is multiplied with.
        kind: the form.
        common: the mean one of all experts of the layer, fp32 [K, K].
    """
    together = weight.float().unsqueeze(0)
    made = _Rounded(together, LOW_BITS[kind])
    round_with_feedback(together, damped(moments.unsqueeze(0), common), LOW_GROUP, made.group)
    return made.matrix(kind)


class _Rounded:
    """Collects the codes and the scales of [1, R, K]."""

    def __init__(self, weight: Tensor, bits: int) -> None:
        self._grid = low_bits.Grid.over(weight, bits)
        self._codes: list[Tensor] = []
        self._s: list[Tensor] = []
        self._z: list[Tensor] = []

    def group(self, columns: Tensor, counts: Tensor) -> Callable[[Tensor], Tensor]:
        """See ``error_feedback.RoundGroup``."""
        s, z = self._grid.fit(columns, counts)
        self._s.append(s)
        self._z.append(z)

        def nearest(column: Tensor) -> Tensor:
            codes = self._grid.codes(column, s, z)
            self._codes.append(codes.to(torch.uint8))
            return self._grid.values(codes, s, z)

        return nearest

    def matrix(self, kind: Kind) -> Matrix:
        """What was found."""
        codes, s, z = (torch.cat(one, 2)[0] for one in (self._codes, self._s, self._z))
        grid = low_bits.Grid(self._grid.bits, self._grid.scale[0], self._grid.zero[0])
        rows, columns = codes.shape
        values, scales = low_bits.store(grid, codes, s, z, first_divisor(TILES, rows))
        return Matrix(kind, values, scales, rows, columns, LOW_GROUP)
