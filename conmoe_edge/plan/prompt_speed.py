"""How long a prompt should take: arithmetic, what lies between the products, and what has to be read for each chunk.
One conversation, arithmetic only.

With O the operations of a prompt of T tokens on weights of a form and R how many a second the machine makes of them
(products of bytes in registers, or large products in floating point), r the share of those that kernels get to, H the
hidden size, L the layers, B the memory's bandwidth, and D the bytes that its chunks read from below it:

    seconds = dense O / (r R) + c T H L / B + max(experts O / (r R), D / B_below)

Reads go on beside the products of experts alone: what a layer asks for is known when its router has chosen. A chunk of
t tokens asks for the share 1 - (1 - k / E)^t of the E experts of a layer where routing is evenly spread, and finds
those that stay in the cache slots. ``PROMPT_REACH`` has r and c, with where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from conmoe_edge.memory.budget import Budget, DeviceKind
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.dense_precision import stored_matrices
from conmoe_edge.plan.levers import PRECISIONS
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.speed import below_seconds

PROMPT_TOKENS = 512
"""Of the prompt whose time a plan says."""


@dataclass(frozen=True, slots=True)
class PromptReach:
    """What prompts get out of a device.

    Attributes:
        floats: of the rate of large products in floating point.
        bytes: of the rate of products of bytes in registers: weights are expanded on the way, experts have few tokens.
        between: bytes that pass for each number of a token's hidden state in a layer beside products: attention, norms,
            sums, rounding.
    """

    floats: float
    bytes: float
    between: float


PROMPT_REACH: Mapping[DeviceKind, PromptReach] = MappingProxyType(
    {
        # bytes: the kernels' own share at OLMoE's sizes, 0.57 to 0.70. between: what is left then of prompts of 512
        # tokens of OLMoE-1B-7B's shape in 2 to 4 bits (3.24 to 3.35 s at 36 GB/s and 938 GOP/s,
        # benchmarks/results/low-bits-speed.txt), and of 256 of gpt-oss-20b's (4.5 s). floats: OLMoE in bf16 with AVX2,
        # 16.6 s at 90 GFLOP/s.
        "cpu": PromptReach(floats=0.80, bytes=0.60, between=3000.0),
        # Not measured.
        "cuda": PromptReach(floats=0.50, bytes=0.50, between=3000.0),
    }
)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Operations a second of a machine: of large products in floating point, and of bytes; 0 where it makes none so."""

    floats: float
    bytes: float


@dataclass(frozen=True, slots=True)
class PromptWork:
    """What a prompt takes.

    Attributes:
        tokens, layers, hidden: of the prompt and the model.
        dense_floats, dense_bytes: operations outside the routed experts, in floating point and on bytes.
        expert_floats, expert_bytes: those of the routed experts.
        from_disk, from_host: bytes of records that all its chunks read.
    """

    tokens: int
    layers: int
    hidden: int
    dense_floats: float
    dense_bytes: float
    expert_floats: float
    expert_bytes: float
    from_disk: float = 0.0
    from_host: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptSpeed:
    """What a plan says of a prompt."""

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Over the whole prompt."""
        return self.tokens / self.seconds


def expected_prompt(work: PromptWork, budget: Budget, rates: Arithmetic) -> float | None:
    """Seconds that a prompt should take with these kernels; ``None`` where a rate that matters is unknown."""
    below = below_seconds(work.from_disk, work.from_host, budget)
    if below is None or not budget.device_bandwidth:
        return None
    reach = PROMPT_REACH.get(budget.device, PROMPT_REACH["cuda"])
    dense = _seconds(work.dense_floats, work.dense_bytes, reach, rates)
    experts = _seconds(work.expert_floats, work.expert_bytes, reach, rates)
    if dense is None or experts is None:
        return None
    passed = reach.between * work.tokens * work.hidden * work.layers
    return dense + passed / budget.device_bandwidth + max(experts, below)


def planned_prompt(
    anatomy: ModelAnatomy, plan: Plan, rates: Arithmetic, tokens: int = PROMPT_TOKENS
) -> PromptSpeed | None:
    """What a prompt of ``tokens`` tokens, or of as many as the context has, should take with the package of ``plan``;
    ``None`` where a rate that matters is unknown.

    ``anatomy``: of the checkpoint.
    """
    tokens = min(tokens, plan.context)
    chosen = plan.chosen
    # As if no neuron were cut off: which are is found by the fit.
    routed = sum(one.top_k * one.expert_numel for one in anatomy.moe_experts)
    operations = 2.0 * tokens * routed
    in_bytes = experts_in_bytes(chosen.precision, chosen.wide_prototypes / chosen.prototypes)
    dense, dense_bytes = dense_operations(anatomy, plan.dense_precision, tokens)
    if not rates.bytes:
        in_bytes, dense, dense_bytes = 0.0, dense + dense_bytes, 0.0
    offloaded = max(0, chosen.pool_bytes - chosen.resident_bytes)
    disk, host = prompt_reads(anatomy, offloaded, tokens, plan.prefill_chunk, plan.budget)
    work = PromptWork(
        tokens=tokens,
        layers=len(anatomy.layers),
        hidden=anatomy.hidden_size,
        dense_floats=dense,
        dense_bytes=dense_bytes,
        expert_floats=operations * (1.0 - in_bytes),
        expert_bytes=operations * in_bytes,
        from_disk=disk,
        from_host=host,
    )
    seconds = expected_prompt(work, plan.budget, rates)
    return None if seconds is None else PromptSpeed(tokens, seconds)


def prompt_reads(
    anatomy: ModelAnatomy, offloaded: int, tokens: int, chunk: int, budget: Budget
) -> tuple[float, float]:
    """Bytes that all chunks of a prompt read from the disk and from a GPU machine's RAM, where ``offloaded`` bytes of
    the prototypes have no cache slot: each chunk those of them that its tokens ask for, once.
    """
    shape = anatomy.moe_experts
    lengths = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    asked = sum(asked_share(one.top_k, one.count, length) for one in shape for length in lengths)
    nbytes = offloaded * asked / len(shape)
    if budget.device == "cpu" or not offloaded:
        return nbytes, 0.0
    held = 1.0 if budget.host_bytes is None else min(1.0, budget.host_bytes / offloaded)
    return nbytes * (1.0 - held), nbytes * held


def asked_share(top_k: int, experts: int, tokens: int) -> float:
    """Share of a layer's experts that some of ``tokens`` tokens ask for, where routing is evenly spread."""
    return 1.0 - (1.0 - min(top_k, experts) / experts) ** tokens


def experts_in_bytes(precision: str, wide_share: float = 0.0) -> float:
    """The share of the prototypes of a precision whose products a CPU makes of bytes; ``wide_share`` of those of a
    mixed one are of its first kind.
    """
    kinds = PRECISIONS[precision].kinds
    if len(kinds) != 2:
        return float(kinds[0] not in _IN_FLOATS)
    first, second = (float(kind not in _IN_FLOATS) for kind in kinds)
    return wide_share * first + (1.0 - wide_share) * second


def dense_operations(anatomy: ModelAnatomy, precision: str, tokens: int) -> tuple[float, float]:
    """Operations of a prompt outside the routed experts: in floating point, and on matrices that are stored in
    ``precision`` or fewer bits, which are made of bytes. Only the last token goes through the head.
    """
    found = {False: 0.0, True: 0.0}
    ends = [one for one in anatomy.dense_matrices if one.at_an_end]
    for matrix, kind in stored_matrices(anatomy, precision):
        if matrix.looked_up and len(ends) > 1:
            continue
        rows = 1 if matrix.at_an_end else tokens
        found[kind != "plain"] += 2.0 * rows * matrix.rows * matrix.columns
    return found[False], found[True]


_IN_FLOATS = ("source", "bf16", "lowrank")


def _seconds(floats: float, in_bytes: float, reach: PromptReach, rates: Arithmetic) -> float | None:
    seconds = 0.0
    for operations, rate in (
        (floats, reach.floats * rates.floats),
        (in_bytes, reach.bytes * rates.bytes),
    ):
        if operations:
            if not rate:
                return None
            seconds += operations / rate
    return seconds
