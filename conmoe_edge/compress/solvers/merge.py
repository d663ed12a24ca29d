"""One expert out of several: the mean of their weights, weighted by how much they were used.

    W = sum over e in the group of n_e W_e / sum over e in the group of n_e

for every matrix and bias (M-SMoE, arXiv 2310.01334, section 3.2). A group that nobody used is averaged
with equal weights. Neurons have to be aligned before (``align.py``): the mean of unaligned experts is
none of them.

Sums are in fp64 and rounded once, so that equal experts merge to themselves bit for bit. Peak
memory: one expert in fp64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def shares(usage: Sequence[float]) -> list[float]:
    """Usage as shares of 1; equal ones where all of it is 0.

    Raises:
        ValueError: a negative usage, or one that is no number; a mistake of the caller.
    """
    if not usage or not all(0.0 <= one < float("inf") for one in usage):
        raise ValueError(f"{list(usage)} is no usage of experts")
    total = sum(usage)
    return [1.0 / len(usage) if total == 0 else one / total for one in usage]


def weighted_mean(
    members: Iterable[Mapping[str, Tensor]], usage: Sequence[float]
) -> dict[str, Tensor]:
    """The mean of experts of one layout, taken one after another.

    Args:
        members: their tensors by parameter name, aligned.
        usage: of each, such as the number of its tokens; a member that was not used adds nothing
            beside used ones.

    Returns:
        Tensors in fp32.
    """
    total: dict[str, Tensor] = {}
    for parts, share in zip(members, shares(usage), strict=True):
        for name, part in parts.items():
            wide = part.to(torch.float64) * share
            total[name] = total[name].add_(wide) if name in total else wide
    return {name: part.float() for name, part in total.items()}
