"""Agglomerative clustering with average linkage, cut at a number of clusters. Pure.

Every point begins alone; again and again the two clusters with the least mean distance between their
points,

    d(A, B) = 1 / (|A| |B|) * sum over a in A, b in B of |a - b|_2,

become one, until as many are left as were asked for. The tree is scipy's (nearest-neighbour chains,
the same tree as by trying all pairs); it is cut by its first merges and not at a height, since a cut
at a height gives fewer clusters than asked for where two merges are equally high. The same points give
the same clusters on every run.

Peak memory: the points and their distances in fp64.
"""

from __future__ import annotations

from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist
from torch import Tensor


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
