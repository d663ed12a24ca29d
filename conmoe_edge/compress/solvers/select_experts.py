"""Which experts are kept (ConMoE, section 3.3). Pure. How many is the plan's arithmetic (``plan.levers.kept``)."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(score: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the ``count`` highest scores, ascending. Ties go to the lowest index, that is (layer, expert)."""
    order = torch.argsort(score, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))
