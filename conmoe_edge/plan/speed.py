"""Decode speed by the bytes that a token moves: what is expected, and the bound that no runtime
passes. One conversation, arithmetic only.

Without prediction a miss cannot overlap its own layer (the router decides just before), so the
times of memory and of what lies below it add up. With D the dense bytes that a token reads (the
embedding table is looked up, not read, unless it is also the head), X its routed bytes, h the share
of the requests that the slots serve, n the requests of a token and L the layers:

    bound     t = (D + X) / B_memory + (1 - h) * X / B_below
    expected  t = D / (e * B_memory) + X / (e' * B_memory) + (1 - h) * X / B_below      e, e': of each kind of weights
                  + L * o + (1 - h) * n * m

``Reach`` has the shares e of a streaming read that the kernels get to, by the form in which weights
are stored, and the times o and m that a layer and a miss take beside their bytes. They are constants
of this program more than of a machine; they stand in one place (``REACH``), and
``benchmarks/speed_constants.py`` says where they come from.

Before calibration h is the resident share, which is what evenly spread routing gives, and router
slots that meet on one prototype are counted twice: both are the careful side. Afterwards the
replayed hit rate and ``distinct_share`` take their places. A GPU's misses come over the link while
its machine's RAM holds them, and from the disk where it does not.

The bound of a prompt is the same idea with arithmetic in the place of memory (``prefill_bound``); what is expected of
one is in ``prompt_speed.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from conmoe_edge.memory.budget import Budget, DeviceKind
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.dense_precision import read_by_kind
from conmoe_edge.plan.levers import PRECISIONS, record_bytes


@dataclass(frozen=True, slots=True)
class Reach:
    """What the kernels of a device get out of it.

    Attributes:
        kernels: share of the streaming read bandwidth that products with one row reach, by kind of
            record and of dense matrices; keys, values and what is not in fewer bits count as ``source``.
        layer_seconds: of a decoder layer beside its bytes: Python, small kernels, the router.
        miss_seconds: of a prototype that is not there, beside its bytes: the cache's decision, a read
            that is handed to a thread, products that wait for it.
    """

    kernels: Mapping[str, float]
    layer_seconds: float
    miss_seconds: float


REACH: Mapping[DeviceKind, Reach] = MappingProxyType(
    {
        "cpu": Reach(
            MappingProxyType(
                # mxfp4, q4, q3, q2: products alone (benchmarks/kernels.py) reached 0.80 to 1.03 at OLMoE's sizes, and
                # more at gpt-oss's; free is a mix of them. lowrank is not measured: half of source, for three small
                # products, not one.
                {
                    "source": 0.84,
                    "bf16": 0.84,
                    "int8": 0.82,
                    "int4": 0.80,
                    "mxfp4": 0.80,
                    "q6": 0.80,
                    "q4": 0.80,
                    "q3": 0.80,
                    "q2": 0.75,
                    "free": 0.80,
                    "lowrank": 0.42,
                }
            ),
            layer_seconds=430e-6,
            miss_seconds=350e-6,
        ),
        # Not measured: shares that such kernels usually reach, the launches of a layer, a copy's events.
        "cuda": Reach(
            MappingProxyType(
                {
                    "source": 0.75,
                    "bf16": 0.75,
                    "int8": 0.60,
                    "int4": 0.50,
                    "mxfp4": 0.50,
                    "q6": 0.40,
                    "q4": 0.40,
                    "q3": 0.40,
                    "q2": 0.40,
                    "free": 0.40,
                    "lowrank": 0.35,
                }
            ),
            layer_seconds=350e-6,
            miss_seconds=50e-6,
        ),
    }
)
"""``mps`` and ``xpu`` are missing: nothing was measured there, so ``reach_of`` takes a GPU's."""


def reach_of(device: DeviceKind) -> Reach:
    """The kernels' reach on a device."""
    return REACH.get(device, REACH["cuda"])


_BITS = {"int8": 8, "int4": 4.5, "mxfp4": 4.25, "q4": 4.25, "q3": 3.25, "q2": 2.25}


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one decoded token moves, in bytes; means over many tokens, so fractions are allowed.

    Attributes:
        dense: weights outside the routed experts, and keys and values, that are read.
        routed: records of distinct prototypes that are computed with, by their kind.
        from_disk, from_host: of those, what had to be brought to the device first.
        layers: decoder layers.
        missed: how many prototypes that is.
        dense_kinds: of the dense bytes, those of matrices in fewer bits, by their kind.
    """

    dense: float
    routed: Mapping[str, float]
    from_disk: float
    from_host: float
    layers: int
    missed: float = 0.0
    dense_kinds: Mapping[str, float] = field(default_factory=dict)

    @property
    def read(self) -> float:
        """All that the kernels read from the device's memory."""
        return self.dense + sum(self.routed.values())


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time that a piece of work can take, in seconds.

    ``device``: the memory's part of a token, the arithmetic's part of a prompt; ``below``: what has
    to come from disk or host. ``serial`` is one after the other, ``overlapped`` the longer alone.
    """

    device: float
    below: float

    @property
    def serial(self) -> float:
        """Nothing overlaps."""
        return self.device + self.below

    @property
    def overlapped(self) -> float:
        """Everything overlaps."""
        return max(self.device, self.below)


def kernel_share(kernels: Mapping[str, float], kind: str) -> float:
    """The share of a kind of record. Where gate and up have another form than down, both count by their bytes, gate
    and up being two thirds of the numbers; a kind that is not known counts as plain.
    """
    plain = kernels["source"]
    inputs, _, down = kind.partition("-")
    if not down:
        return kernels.get(kind, plain)
    sizes = (2 * _BITS.get(inputs, 16), _BITS.get(down, 16))
    seconds = sizes[0] / kernels.get(inputs, plain) + sizes[1] / kernels.get(down, plain)
    return sum(sizes) / seconds


def decode_bound(step: StepBytes, budget: Budget) -> Bound | None:
    """The bound of one token; ``None`` where a bandwidth that matters is unknown."""
    below = below_seconds(step.from_disk, step.from_host, budget)
    if not budget.device_bandwidth or below is None:
        return None
    return Bound(step.read / budget.device_bandwidth, below)


def prefill_bound(
    work: Iterable[tuple[float, float]], from_disk: float, from_host: float, budget: Budget
) -> Bound | None:
    """The bound of a whole prompt; ``None`` where a bandwidth that matters is unknown.

    ``work`` has operations and how many of that kind a second allows: products in floating point, and on a CPU those of
    weights in 8 bits and fewer, which are made of bytes.
    """
    below = below_seconds(from_disk, from_host, budget)
    seconds = sum(operations / rate for operations, rate in work if operations)
    return None if below is None else Bound(seconds, below)


def expected_seconds(step: StepBytes, budget: Budget) -> float | None:
    """What a token should take with these kernels; ``None`` where a bandwidth is unknown."""
    below = below_seconds(step.from_disk, step.from_host, budget)
    if not budget.device_bandwidth or below is None:
        return None
    reach = reach_of(budget.device)
    # A kind that is not known comes from a manifest of another version.
    moved = sum(nbytes / kernel_share(reach.kernels, kind) for kind, nbytes in step.routed.items())
    moved += step.dense / dense_share(reach.kernels, step.dense, step.dense_kinds)
    beside = step.layers * reach.layer_seconds + step.missed * reach.miss_seconds
    return moved / budget.device_bandwidth + below + beside


def tokens_per_second(
    anatomy: ModelAnatomy,
    budget: Budget,
    *,
    precision: str,
    resident_share: float,
    offloaded_bytes: int,
    wide_share: float = 0.0,
) -> float | None:
    """Expected tokens a second at a short context; ``None`` where a bandwidth that matters is
    unknown.

    ``offloaded_bytes`` is the part of the prototypes that the slots do not hold; ``wide_share`` the
    part of them that a mixed precision stores in its first kind.
    """
    routed = routed_bytes(anatomy, precision, wide_share)
    step = planned_step(
        anatomy, budget, routed, hit_rate=resident_share, offloaded_bytes=offloaded_bytes
    )
    seconds = expected_seconds(step, budget)
    return None if seconds is None else 1.0 / seconds


def planned_step(
    anatomy: ModelAnatomy,
    budget: Budget,
    routed: Mapping[str, float],
    *,
    hit_rate: float,
    offloaded_bytes: int,
    dense: float | None = None,
    dense_kinds: Mapping[str, float] | None = None,
    requests: float | None = None,
) -> StepBytes:
    """A token of a model that has not run yet: ``hit_rate`` of the routed bytes are there, the rest
    comes from the tiers below.

    ``dense`` is what a token reads beside the prototypes and ``dense_kinds`` what of it is in fewer bits, ``requests``
    how many of them it asks for, where that is known better.
    """
    if dense is None:
        dense_kinds = read_by_kind(anatomy)
        dense = sum(dense_kinds.values())
    if requests is None:
        requests = sum(one.experts.top_k for one in anatomy.moe_layers if one.experts is not None)
    missed = (1.0 - hit_rate) * sum(routed.values())
    on_disk = 1.0
    if budget.device != "cpu":
        held = budget.host_bytes
        within = held is None or offloaded_bytes <= held
        on_disk = 0.0 if within or held is None else 1.0 - held / offloaded_bytes
    return StepBytes(
        dense=dense,
        routed=routed,
        from_disk=missed * on_disk,
        from_host=missed * (1.0 - on_disk),
        layers=len(anatomy.layers),
        missed=(1.0 - hit_rate) * requests,
        dense_kinds=dense_kinds or {},
    )


def routed_bytes(
    anatomy: ModelAnatomy, precision: str, wide_share: float = 0.0
) -> dict[str, float]:
    """Bytes of routed experts that one token needs, by kind of record.

    ``wide_share`` of them are of the first kind of a mixed precision.
    """
    kinds = PRECISIONS[precision].kinds
    shares = (wide_share, 1.0 - wide_share) if len(kinds) == 2 else (1.0,)
    found = dict.fromkeys(kinds, 0.0)
    for layer in anatomy.moe_layers:
        if layer.experts is not None:
            for kind, share in zip(kinds, shares, strict=True):
                found[kind] += share * layer.experts.top_k * record_bytes(layer.experts, kind)
    return found


def distinct_share(slots_of: Iterable[int], slots: int, top_k: int) -> float:
    """Distinct prototypes that ``top_k`` evenly drawn router slots meet, as a share of ``top_k``.

    ``slots_of`` has, for every prototype of a layer, how many of its ``slots`` router slots lead
    there. If m of E do, then k distinct slots miss it with the chance C(E - m, k) / C(E, k).
    """
    draws = math.comb(slots, top_k)
    return sum(1.0 - math.comb(slots - count, top_k) / draws for count in slots_of) / top_k


def dense_read_bytes(anatomy: ModelAnatomy) -> int:
    """Dense bytes that one token reads: without the embedding table, unless the head shares it."""
    return sum(read_by_kind(anatomy).values())


def dense_share(kernels: Mapping[str, float], dense: float, kinds: Mapping[str, float]) -> float:
    """The share of the bandwidth that kernels reach on ``dense`` bytes, of which ``kinds`` are in fewer bits."""
    few = {kind: nbytes for kind, nbytes in kinds.items() if kind != "source"}
    moved = max(0.0, dense - sum(few.values())) / kernels["source"]
    moved += sum(nbytes / kernel_share(kernels, kind) for kind, nbytes in few.items())
    return dense / moved if moved else kernels["source"]


def below_seconds(from_disk: float, from_host: float, budget: Budget) -> float | None:
    """Seconds in which missing prototypes arrive; ``None`` where the way's bandwidth is unknown."""
    disk, link = budget.disk_bandwidth, budget.link_bandwidth
    if budget.device == "cpu":
        disk = disk or link
    elif disk and link:
        disk = min(disk, link)  # what comes from the disk crosses the link as well
    seconds = 0.0
    for nbytes, rate in ((from_disk, disk), (from_host, link)):
        if nbytes > 0:
            if not rate:
                return None
            seconds += nbytes / rate
    return seconds
