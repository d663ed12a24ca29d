"""Gram matrices of inputs, weighted with what each token counts."""

from __future__ import annotations

import torch
from torch import Tensor

_STRIP = 256
"""Columns of a strip: products are taken for the strips on and above the diagonal only."""


def gram(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """fp32 [K, K]: the sum over rows of ``values`` [n, K] of w^2 x x^T; ``weights`` [n], 1 by default.

    Peak memory: the rows once more in fp32, and the result.
    """
    wide = values.float()
    if weights is not None:
        wide = wide * weights.to(wide.device).unsqueeze(1)
    count = wide.shape[1]
    if count <= _STRIP:
        return wide.T @ wide
    found = torch.empty(count, count, device=wide.device)
    for start in range(0, count, _STRIP):
        stop = min(start + _STRIP, count)
        strip = wide[:, start:stop].T @ wide[:, start:]
        found[start:stop, start:] = strip
        found[stop:, start:stop] = strip[:, stop - start :].T
    return found
