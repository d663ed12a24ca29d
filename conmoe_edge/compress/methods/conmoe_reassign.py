"""Where the others go: nearest-prototype reassignment (ConMoE, section 3.3). Pure.

m(e) = argmin over p in P of d(e, p);  a prototype maps to itself
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def nearest_prototype(distance: Tensor, prototypes: Sequence[int]) -> tuple[int, ...]:
    """For every expert of the pool the index of its prototype.

    Args:
        distance: [P, P].
        prototypes: ascending indices. Ties go to the lowest.
    """
    columns = torch.tensor(list(prototypes))
    nearest = columns[distance[:, columns].argmin(dim=1)]  # argmin takes the first of equals
    nearest[columns] = columns
    return tuple(nearest.tolist())
