"""What bits cost a model that is known: the demo model, before anything was measured on the one that is planned.

The rows are receipts of ``conmoe-edge fit demo --gpu 2GiB --device cpu --passes 1 --bits B``. Between them the
logarithm of the divergence is taken to be straight. A large model may lose less or more: the figure is shown as what
it is. Arithmetic only.
"""

from __future__ import annotations

import math
from itertools import pairwise

DEMO = (
    (1.75, 0.0398),
    (2.06, 0.0240),
    (2.56, 0.0114),
    (3.44, 0.0040),
)
"""Bits a weight of the routed experts, and the mean KL divergence in nats from the original on held-out text."""


def demo_divergence(bits: float) -> float | None:
    """Of the demo model with so many bits; ``None`` outside of what was measured."""
    for (low, more), (high, less) in pairwise(DEMO):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * math.log(more) + share * math.log(less))
    return None
