"""A matrix outside the routed experts in 8, 6 or 4 bits, each column making up for what those before it lost.

Rows are independent of each other, and are taken in runs. Peak memory: what ``round_matrix`` takes for one run,
and the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format import low_bits
from conmoe_edge.checkpoint.format.forms import LOW_GROUP, TILES, Kind
from conmoe_edge.checkpoint.format.quantise import Matrix, quantise
from conmoe_edge.compress.solvers.rounding import inputs_of, round_for

_RUN = 1 << 24
"""Numbers that are rounded at a time."""


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
    inputs, parts = inputs_of(moments.unsqueeze(0)), []
    for start in range(0, rows, step):
        (matrix,) = round_for(weight[start : start + step].unsqueeze(0), inputs, kind)
        assert matrix.scales is not None
        parts.append((matrix.values, matrix.scales))
    if kind != "int8":
        return Matrix(kind, *low_bits.joined(parts), rows, columns, LOW_GROUP)
    values, scales = (torch.cat(one) for one in zip(*parts, strict=True))
    return Matrix(kind, values, scales, rows, columns)
