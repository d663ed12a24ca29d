"""A matrix outside the routed experts in 8, 6 or 4 bits, each column making up for what those before it lost.

Rows are independent of each other, and are taken in runs. Peak memory: what ``round_matrix`` takes for one run, and the
result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format import low_bits
from conmoe_edge.checkpoint.format.forms import LOW_GROUP, TILES, Kind, first_divisor
from conmoe_edge.checkpoint.format.quantise import Matrix, quantise, row_scales
from conmoe_edge.compress.solvers.error_feedback import damped, round_with_feedback
from conmoe_edge.compress.solvers.rounding import round_matrix

_RUN = 1 << 24
"""Numbers that are rounded at a time."""
_STEPS = (128, 64, 32, 16, 8, 4, 2, 1)


def round_dense(weight: Tensor, moments: Tensor | None, kind: Kind) -> Matrix:
    """``weight`` [R, K] in the form ``kind``, int8 or one of ``LOW_BITS`` that takes its shape.

    Args:
        weight: rows are outputs.
        moments: fp32 [K, K], the Gram matrix of its inputs; ``None`` rounds to the nearest.
        kind: the form.
    """
    if moments is None:
        return quantise(weight, kind)
    rows, columns = weight.shape
    step = max(1, _RUN // columns // TILES[0]) * TILES[0]
    runs = [weight[start : start + step] for start in range(0, rows, step)]
    if kind == "int8":
        made = [_int8(run, moments) for run in runs]
        values, scales = (torch.cat(parts) for parts in zip(*made, strict=True))
        return Matrix(kind, values, scales, rows, columns)
    parts = []
    for run in runs:
        matrix = round_matrix(run, moments, kind)
        assert matrix.scales is not None
        parts.append((matrix.values, matrix.scales))
    return Matrix(kind, *low_bits.joined(parts), rows, columns, LOW_GROUP)


def _int8(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales; each row keeps the scale that it has without feedback."""
    wide = weight.float().unsqueeze(0)
    scales = row_scales(wide[0])
    step = torch.where(scales > 0, scales.float(), 1.0).view(1, -1, 1)
    codes: list[Tensor] = []

    def group(columns: Tensor, counts: Tensor) -> Callable[[Tensor], Tensor]:
        def nearest(column: Tensor) -> Tensor:
            found = (column / step).round_().clamp_(-127, 127)
            codes.append(found[0].to(torch.int8))
            return found * step

        return nearest

    round_with_feedback(
        wide, damped(moments.unsqueeze(0)), first_divisor(_STEPS, wide.shape[2]), group
    )
    return torch.cat(codes, 1), scales
