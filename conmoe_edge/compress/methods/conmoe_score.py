"""Replaceability and the prototype score (ConMoE, section 3.2). Pure functions of small tensors.

b_e = min over e' != e in the scope of d(e, e')
x^  = (x - min x) / (max x - min x + eps)           within the scope
s_e = a^_e * b^_e
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-12


def replaceability(distance: Tensor) -> Tensor:
    """[P]: the distance to the nearest other expert; large means hard to replace. distance: [P, P].

    The only expert of a scope has no neighbour; its replaceability is 0.
    """
    if distance.shape[0] == 1:
        return torch.zeros(1, dtype=distance.dtype)
    others = distance.clone()
    others.fill_diagonal_(float("inf"))
    return others.min(dim=1).values


def min_max(values: Tensor) -> Tensor:
    """[P] -> [P] in [0, 1]; all zero where the values are all equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low + EPSILON)


def prototype_score(contribution: Tensor, distance: Tensor) -> Tensor:
    """[P]: s_e. contribution: [P] a_e over the whole scope; distance: [P, P]."""
    return min_max(contribution) * min_max(replaceability(distance))
