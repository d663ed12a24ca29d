"""From measured rounds to the report of ``bench``: medians, what a token moves, the bounds and the
share of them. Pure functions of frozen dataclasses; nothing is timed or printed here.

Two bounds stand in it. *Serial*: every byte that a token needs is read from memory once, every byte
that was missing comes from below once, one after the other, at the bandwidths measured on this
machine. *Overlapped*: only the longer of the two. ``share`` is measured speed over the bound's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from conmoe_edge.memory.budget import Budget
from conmoe_edge.plan.speed import Bound, StepBytes, decode_bound, expected_seconds, prefill_bound

if TYPE_CHECKING:
    from conmoe_edge.offload.generation.benchmark import Phase, Round


@dataclass(frozen=True, slots=True)
class BenchFacts:
    """What is known of package and machine before a token is run.

    Attributes:
        package: where it is and what it is, for the reader: plain JSON.
        settings: what was asked for: plain JSON.
        runtime: names of the kernel, the cache policy and the way of reading.
        budget: with the bandwidths of this machine.
        threads: that compute.
        dense_bytes: that a token reads beside prototypes, keys and values.
        cache_bytes: keys and values that a token reads, in the middle of the answer.
        kept_bytes: routed experts that a token reads from a model that was left whole.
        record_bytes: mean bytes of a record, by kind, times the kind's share of the requests.
        prompt_flops: of a whole prompt.
        flops_per_second: of a large matrix product here.
        prompt_byte_operations: of a whole prompt, those of bytes; ``prompt_flops`` are the others.
        byte_operations_per_second: that stay in registers here; 0 where there are none.
        layers: decoder layers.
        expected: tokens a second by the speed model for this budget, ``None`` where it cannot say.
        planned: what the package's own plan said, for the budget that it was made for.
        dense_kinds: of the dense bytes, those of matrices in fewer bits, by their kind.
        expected_prompt: seconds of a prompt by the speed model, ``None`` where it cannot say.
        fast_path: which way single tokens take, in one line; empty where that is not known.
        fast_path_json: the same in full.
    """

    package: Mapping[str, Any]
    settings: Mapping[str, Any]
    runtime: Mapping[str, str]
    budget: Budget
    threads: int
    dense_bytes: int
    cache_bytes: int
    kept_bytes: float
    record_bytes: Mapping[str, float]
    prompt_flops: float
    flops_per_second: float
    layers: int
    expected: float | None
    planned: float | None
    fast_path: str = ""
    fast_path_json: Mapping[str, Any] | None = None
    prompt_byte_operations: float = 0.0
    byte_operations_per_second: float = 0.0
    expected_prompt: float | None = None
    dense_kinds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """A phase over all rounds; bytes, seconds and the bound are per token, medians.

    ``memory_bytes`` is what the kernels read, ``None`` for a prompt, where arithmetic is the
    device's part. ``hit_rate`` is ``None`` where no prototype was asked for.
    """

    tokens_per_second: Spread
    hit_rate: float | None
    memory_bytes: float | None
    disk_bytes: float
    host_bytes: float
    waited_seconds: float
    waited_share: float
    bound: Bound | None

    @property
    def share(self) -> float | None:
        """Of the serial bound."""
        return None if self.bound is None else self.tokens_per_second.median * self.bound.serial

    @property
    def share_overlapped(self) -> float | None:
        """Of the overlapped bound."""
        bound = self.bound
        return None if bound is None else self.tokens_per_second.median * bound.overlapped


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All that ``bench`` says.

    ``expected_reads``: decode speed by the speed model for the reads that were measured, not for those that the plan
    expects; ``None`` where it cannot say.
    """

    facts: BenchFacts
    rounds: tuple[Round, ...]
    decode: PhaseReport
    prefill: PhaseReport
    first_token_seconds: Spread
    memory_used: int
    expected_reads: float | None = None

    @property
    def expected_ratio(self) -> float | None:
        """Measured decode speed over the expected one."""
        expected = self.facts.expected
        return self.decode.tokens_per_second.median / expected if expected else None

    @property
    def prompt_ratio(self) -> float | None:
        """Measured speed of a prompt over the expected one."""
        expected, prefill = self.facts.expected_prompt, [one.prefill for one in self.rounds]
        return expected / statistics.median(one.seconds for one in prefill) if expected else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: sizes in bytes, times in seconds, bandwidths in bytes a second."""
        facts, budget = self.facts, self.facts.budget
        runtime: dict[str, Any] = dict(facts.runtime)
        if facts.fast_path_json is not None:
            runtime["fast_path"] = dict(facts.fast_path_json)
        return {
            "package": {
                **facts.package,
                "layers": facts.layers,
                "dense_read_bytes": facts.dense_bytes + facts.cache_bytes,
            },
            "settings": dict(facts.settings),
            "runtime": runtime,
            "machine": {
                "device": budget.device,
                "threads": facts.threads,
                "memory_bandwidth": budget.device_bandwidth,
                "link_bandwidth": budget.link_bandwidth if budget.device == "cuda" else None,
                "disk_bandwidth": budget.disk_bandwidth,
                "flops_per_second": facts.flops_per_second,
                "byte_operations_per_second": facts.byte_operations_per_second or None,
            },
            "decode": _phase_json(self.decode),
            "prefill": {
                **_phase_json(self.prefill),
                "first_token_seconds": asdict(self.first_token_seconds),
            },
            "memory": {"used_bytes": self.memory_used, "budget_bytes": budget.device_bytes},
            "expected": {
                "tokens_per_second": facts.expected,
                "measured_ratio": self.expected_ratio,
                "planned_tokens_per_second": facts.planned,
                "tokens_per_second_with_these_reads": self.expected_reads,
                "prompt_seconds": facts.expected_prompt,
                "prompt_measured_ratio": self.prompt_ratio,
            },
            "rounds": [asdict(one) for one in self.rounds],
        }


def make_report(facts: BenchFacts, rounds: Sequence[Round]) -> BenchReport:
    """Medians and bounds of at least one round."""
    phases = [one.decode for one in rounds]
    step = _step(facts, phases)
    seconds = expected_seconds(step, facts.budget)
    return BenchReport(
        facts=facts,
        rounds=tuple(rounds),
        decode=_phase(phases, step.read, decode_bound(step, facts.budget)),
        prefill=_prefill(facts, [one.prefill for one in rounds]),
        first_token_seconds=_spread([one.prefill.seconds for one in rounds]),
        memory_used=max(one.memory_used for one in rounds),
        expected_reads=None if seconds is None else 1.0 / seconds,
    )


def _step(facts: BenchFacts, phases: Sequence[Phase]) -> StepBytes:
    """A token as it was measured."""

    def median(value: Callable[[Phase], float]) -> float:
        return statistics.median(value(one) / one.tokens for one in phases)

    asked = median(lambda one: one.requests)
    routed = {kind: asked * nbytes for kind, nbytes in facts.record_bytes.items()}
    return StepBytes(
        dense=facts.dense_bytes + facts.cache_bytes + facts.kept_bytes,
        routed=routed,
        from_disk=median(lambda one: one.disk_bytes),
        from_host=median(lambda one: one.host_bytes),
        layers=facts.layers,
        missed=median(lambda one: one.misses),
        dense_kinds=facts.dense_kinds,
    )


def _prefill(facts: BenchFacts, phases: Sequence[Phase]) -> PhaseReport:
    tokens = phases[0].tokens
    whole = prefill_bound(
        [
            (facts.prompt_flops, facts.flops_per_second),
            (facts.prompt_byte_operations, facts.byte_operations_per_second),
        ],
        statistics.median(one.disk_bytes for one in phases),
        statistics.median(one.host_bytes for one in phases),
        facts.budget,
    )
    bound = None if whole is None else Bound(whole.device / tokens, whole.below / tokens)
    return _phase(phases, None, bound)


def _phase(phases: Sequence[Phase], memory_bytes: float | None, bound: Bound | None) -> PhaseReport:
    asked = sum(one.requests for one in phases)
    return PhaseReport(
        tokens_per_second=_spread([one.tokens_per_second for one in phases]),
        hit_rate=sum(one.hits for one in phases) / asked if asked else None,
        memory_bytes=memory_bytes,
        disk_bytes=statistics.median(one.disk_bytes / one.tokens for one in phases),
        host_bytes=statistics.median(one.host_bytes / one.tokens for one in phases),
        waited_seconds=statistics.median(one.waited_seconds / one.tokens for one in phases),
        waited_share=statistics.median(one.waited_seconds / one.seconds for one in phases),
        bound=bound,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def _phase_json(phase: PhaseReport) -> dict[str, Any]:
    bound = phase.bound
    return {
        "tokens_per_second": asdict(phase.tokens_per_second),
        "hit_rate": phase.hit_rate,
        "bytes_per_token": {
            "memory": phase.memory_bytes,
            "host": phase.host_bytes,
            "disk": phase.disk_bytes,
        },
        "waited_seconds_per_token": phase.waited_seconds,
        "waited_share": phase.waited_share,
        "bound": None
        if bound is None
        else {
            "device_seconds_per_token": bound.device,
            "below_seconds_per_token": bound.below,
            "serial_tokens_per_second": 1.0 / bound.serial,
            "overlapped_tokens_per_second": 1.0 / bound.overlapped,
            "share_of_serial": phase.share,
            "share_of_overlapped": phase.share_overlapped,
        },
    }
