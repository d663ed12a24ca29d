"""How much each layer gets, from what a layer's error does to the residual stream. Pure.

Counted in units: prototypes, or parts of one where their widths differ. The error
e_l(K) that is left with K units is known for every K (``widths.layer_curve``), but not what
it does to the stream that later layers read. That is measured once, with the uniform number K_u in layer l alone: the
share d_l of the stream behind the layer that it changes, squared. Small disturbances add up about as their squares
do, so

    d_l(K)  ~  d_l * e_l(K) / e_l(K_u),

and the sum of these over the layers is made least, one part after another going to where it
lowers the sum most. The steps of e_l never grow, so this is the optimum. No layer gets less than half
of the uniform number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerWorth:
    """``curve``: the error left with 0, 1, ... units; ``divergence``: what it does at the uniform number."""

    curve: tuple[float, ...]
    divergence: float


def share_out(layers: Sequence[LayerWorth], uniform: int) -> list[int]:
    """Units of every layer, ``uniform`` times as many as there are layers in all; ties to the first layer."""
    factors = [
        max(0.0, one.divergence) / one.curve[uniform] if one.curve[uniform] > 0.0 else 0.0
        for one in layers
    ]
    counts = [max(1, uniform // 2)] * len(layers)
    for _ in range(uniform * len(layers) - sum(counts)):
        gains = [
            factor * (one.curve[count] - one.curve[count + 1])
            if count + 1 < len(one.curve)
            else -1.0
            for one, factor, count in zip(layers, factors, counts, strict=True)
        ]
        counts[max(range(len(gains)), key=lambda i: (gains[i], -i))] += 1
    return counts


def between(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Half way from one division to another of the same sum; of the halves every second is rounded up."""
    counts = [(a + b) // 2 for a, b in zip(first, second, strict=True)]
    odd = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if (a + b) % 2]
    for i in odd[::2]:
        counts[i] += 1
    return counts
