"""Whether numbers are numbers: neither NaN nor infinite. Memory: one piece of them in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PIECE = 1 << 22
"""Numbers that are summed at once."""


def all_finite(values: Tensor) -> bool:
    """Whether all of ``values`` are numbers, in one pass over them where they are.

    A sum in another format converts all that it is given, so that is a piece at a time.
    """
    return all(
        math.isfinite(float(piece.sum(dtype=torch.float32))) or bool(piece.isfinite().all())
        for piece in values.reshape(-1).split(_PIECE)
    )  # NaN and infinity survive a sum; large numbers may make one of their own
