"""What a fit brings over the network, and the disk that it takes on the way. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.plan import Plan

LAYERS_AT_ONCE = 2
"""Of the source on this disk: the one that is computed, and the next."""


@dataclass(frozen=True, slots=True)
class Fetching:
    """Bytes, all of them at most.

    Attributes:
        nbytes: over the network, without headers and small files.
        scratch_bytes: beside the package while the fit works.
        disk_bytes: package, scratch and cache together.
        cache_bytes: that stay in the hub's cache.
        passes: how often the experts come.
    """

    nbytes: int
    scratch_bytes: int
    disk_bytes: int
    cache_bytes: int
    passes: int


def fetching_of(
    plan: Plan,
    anatomy: ModelAnatomy,
    *,
    total_bytes: int,
    layer_bytes: int,
    whole: bool,
    passes: int,
    tries: bool,
) -> Fetching:
    """For a plan.

    Args:
        plan, anatomy: of the model.
        total_bytes: of all tensors on the hub.
        layer_bytes: of the largest decoder layer there.
        whole: the model goes into the hub's cache and is read from there.
        passes: as asked for.
        tries: whether something is tried in a second one: a survey goes over the experts twice.
    """
    scratch = plan.scratch_bytes
    if whole:
        disk = plan.disk_bytes + scratch + total_bytes
        return Fetching(total_bytes, scratch, disk, total_bytes, passes)
    scratch += LAYERS_AT_ONCE * layer_bytes
    per_layer = [
        one.experts.count * one.experts.expert_bytes for one in anatomy.moe_layers if one.experts
    ]
    scratch += (plan.chosen.scope - 1) * max(
        per_layer, default=0
    )  # wait until their scope is whole
    if plan.dense_precision != "source":
        scratch += anatomy.dense_bytes  # as it was, for the original's stream
    again = 2 * anatomy.experts_bytes if passes == 2 and tries else 0
    return Fetching(total_bytes + again, scratch, plan.disk_bytes + scratch, 0, passes)
