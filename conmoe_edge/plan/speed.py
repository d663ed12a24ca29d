"""Decode speed by the bandwidths alone, for one conversation: to compare settings, no promise.

Without prediction a miss cannot overlap its own layer (the router decides just before), so the
times add up:

    t = (D + X) / B_device + (1 - h) * X / B_link

- D: dense bytes that a token reads (the embedding table is looked up, not read, unless it is also
  the head);
- X: routed bytes (sum of top-k experts over the MoE layers);
- h: share of the requests that the slots serve.

h is taken as the resident share, which is what evenly spread routing gives; caches do better on
real text, so this is the careful side. Router slots that meet on one prototype are counted twice,
which is careful as well. A GPU's misses come over the link while its machine's RAM holds them, and
from the disk where it does not.
"""

from __future__ import annotations

from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.levers import record_bytes


def tokens_per_second(
    anatomy: ModelAnatomy,
    budget: Budget,
    *,
    precision: str,
    resident_share: float,
    offloaded_bytes: int,
) -> float | None:
    """Tokens a second at a short context; ``None`` where a bandwidth that matters is unknown.

    ``offloaded_bytes`` is the part of the prototypes that the slots do not hold.
    """
    if not budget.device_bandwidth:
        return None
    routed = routed_bytes(anatomy, precision)
    seconds = (dense_read_bytes(anatomy) + routed) / budget.device_bandwidth
    missed = (1.0 - resident_share) * routed
    if missed > 0:
        rate = _miss_bandwidth(budget, offloaded_bytes)
        if rate is None:
            return None
        seconds += missed / rate
    return 1.0 / seconds


def routed_bytes(anatomy: ModelAnatomy, precision: str) -> int:
    """Bytes of routed experts that one token needs."""
    return sum(
        layer.experts.top_k * record_bytes(layer.experts, precision)
        for layer in anatomy.moe_layers
        if layer.experts is not None
    )


def dense_read_bytes(anatomy: ModelAnatomy) -> int:
    """Dense bytes that one token reads: without the embedding table, unless the head shares it."""
    size = 4 if anatomy.dtype in ("float32", "float64") else 2
    table = anatomy.vocab_size * anatomy.hidden_size * size
    separate = anatomy.outside_bytes >= 2 * table
    return anatomy.dense_bytes - (table if separate else 0)


def _miss_bandwidth(budget: Budget, offloaded_bytes: int) -> float | None:
    """Bytes per second at which missing prototypes arrive, over the tiers that hold them."""
    link = budget.link_bandwidth
    if budget.device == "cpu":
        return budget.disk_bandwidth or link
    if link is None:
        return None
    if budget.host_bytes is None or offloaded_bytes <= budget.host_bytes:
        return link
    if not budget.disk_bandwidth:
        return None
    on_disk = 1.0 - budget.host_bytes / offloaded_bytes
    return 1.0 / ((1.0 - on_disk) / link + on_disk / min(link, budget.disk_bandwidth))
