"""Experts in groups that become one expert each. Pure; the same groups on every run.

Around the most used (M-SMoE, arXiv 2310.01334, section 3.2): the K experts with the most tokens are dominant; each of
the others joins the dominant one that is most like it. Where the router's logits say what is alike, that is

    (1 + <r_i, r_j> / (|r_i| |r_j|)) / 2

for the columns r of the logits over all calibration tokens. Ties go to the lowest index.

Agglomerative with average linkage: every point begins alone; again and again the two clusters with the least mean
distance between their points,

    d(A, B) = 1 / (|A| |B|) * sum over a in A, b in B of |a - b|_2,

become one. The tree is scipy's. It is cut by its first merges and not at a height, which would give fewer clusters than
asked for where two merges are equally high.

Peak memory: the logits, or the points and their distances, in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist
from torch import Tensor

from conmoe_edge.compress.solvers.ranking import top_k


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


def average_linkage(points: Tensor, clusters: int) -> tuple[tuple[int, ...], ...]:
    """Clusters of the rows of ``points`` [P, d], finite: each ascending, in the order of their first.

    Exactly ``clusters`` of them, or one for each point where there are not more.
    """
    count = len(points)
    members: dict[int, tuple[int, ...]] = {point: (point,) for point in range(count)}
    if clusters < count:
        tree = linkage(pdist(points.double().numpy()), method="average")
        for step, (one, other, _, _) in enumerate(tree[: count - clusters]):
            joined = members.pop(int(one)) + members.pop(int(other))
            members[count + step] = tuple(sorted(joined))
    return tuple(sorted(members.values()))
