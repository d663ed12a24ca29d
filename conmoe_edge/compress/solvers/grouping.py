"""Experts in groups around those that are used most, by how alike the router treats them. Pure.

M-SMoE (arXiv 2310.01334, section 3.2): the K experts with the most tokens are dominant; each of the
others joins the dominant one that is most like it, where the likeness of two experts is that of
their columns r in the router's logits over all calibration tokens,

    (1 + <r_i, r_j> / (|r_i| |r_j|)) / 2.

Ties go to the lowest index. Peak memory: the logits in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe_edge.compress.solvers.select_experts import top_k


@dataclass(frozen=True, slots=True)
class Groups:
    """``cores``: the dominant experts, ascending. ``core_of``: for every expert the core of its group."""

    cores: tuple[int, ...]
    core_of: tuple[int, ...]

    def members(self, core: int) -> tuple[int, ...]:
        """The experts of one group, ascending; its core is one of them."""
        return tuple(expert for expert, one in enumerate(self.core_of) if one == core)


def router_likeness(logits: Tensor) -> Tensor:
    """float64 [E, E] in 0..1 from the router's logits [T, E]; 1/2 for a column of zeros."""
    columns = logits.double()
    norms = columns.norm(dim=0).clamp(min=1e-300)
    cosine = (columns / norms).T @ (columns / norms)
    return (1.0 + cosine) / 2.0


def around_dominant(usage: Sequence[int], likeness: Tensor, keep: int) -> Groups:
    """``keep`` groups.

    Args:
        usage: tokens of every expert.
        likeness: [E, E], larger is more alike.
        keep: how many experts are dominant; all of them where there are not more.
    """
    cores = top_k(torch.tensor(list(usage), dtype=torch.float64), min(keep, len(usage)))
    nearest = likeness[:, list(cores)].argmax(1).tolist()  # the first of equals
    joined = (expert if expert in cores else cores[nearest[expert]] for expert in range(len(usage)))
    return Groups(cores, tuple(joined))
