"""What bits cost a model that is known: the demo model, before anything was measured on the one that is planned.

The rows up to 4.5 bits are means of three seeds (``benchmarks/frontier.py``), the others receipts of ``conmoe-edge
fit demo --gpu 2GiB --device cpu --passes 1 --bits B``. Between them the logarithm of the divergence is taken to be
straight. A large model may lose less or more: the figure is shown as what it is. Arithmetic only.
"""

from __future__ import annotations

import math
from itertools import pairwise

DEMO = (
    (1.75, 0.0366),
    (2.06, 0.0232),
    (2.31, 0.0159),
    (2.56, 0.0112),
    (3.06, 0.0060),
    (3.44, 0.0036),
    (4.50, 0.0014),
    (5.00, 0.0010),
    (6.00, 0.00065),
    (7.00, 0.00041),
    (8.00, 0.0003),
)
"""Bits a weight of the routed experts, and the mean KL divergence in nats from the original on held-out text."""


ANY_CHANGE = 0.0003
"""Of that, what any change costs, however small, because it sends some tokens to other experts: what 8 bits lose."""
DENSE_COST = {"source": 0.0, "int8": 0.0002, "q6": 0.0008, "q4": 0.0025}
KV_COST = {"source": 0.0, "int8": 0.0002}
"""What the dense part and keys and values cost beside it: receipts of ``fit demo --gpu 2GiB --device cpu --rate 0
--precision source --method conmoe --dense-precision P``, and ``eval demo --against demo --kv-precision int8``, less
``ANY_CHANGE``. Added up so they come to what fits in several of these formats lost (docs/offloading.md)."""


def demo_divergence(bits: float) -> float | None:
    """Of the demo model with so many bits; ``None`` outside of what was measured."""
    for (low, more), (high, less) in pairwise(DEMO):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * math.log(more) + share * math.log(less))
    return None


def expected_divergence(bits: float) -> float:
    """``demo_divergence``, its ends drawn out: to compare plans with."""
    inside = [pair for pair in pairwise(DEMO) if bits <= pair[1][0]]
    (low, more), (high, less) = inside[0] if inside else (DEMO[-2], DEMO[-1])
    share = (bits - low) / (high - low)
    return math.exp((1 - share) * math.log(more) + share * math.log(less))
