"""Counters of requests and answers, and their text for Prometheus (text exposition format 0.0.4).

The engine's thread and the event loop write them under one lock. What the engine holds right now
comes as a ``Snapshot`` that its thread makes. No torch.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from conmoe_edge.serve.intake import Intake

if TYPE_CHECKING:
    from conmoe_edge.offload.runtime import RuntimeStats
    from conmoe_edge.serve.kept_prompts import KeptPrompts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

Outcome = Literal["stop", "length", "cancelled", "failed"]
State = Literal["loading", "ready", "stopping", "failed"]


@dataclass(frozen=True, slots=True)
class KeptFigures:
    """What is kept of prompts.

    Attributes:
        prompts, chunks, nbytes: in memory.
        hits, misses: prompts of more than a chunk that began with something known, and those that did not.
        file_hits, file_bytes_read, file_bytes_written: of ``--prompt-cache``: chunks that were read, and bytes.
    """

    prompts: int = 0
    chunks: int = 0
    nbytes: int = 0
    hits: int = 0
    misses: int = 0
    file_hits: int = 0
    file_bytes_read: int = 0
    file_bytes_written: int = 0

    @classmethod
    def of(cls, kept: KeptPrompts) -> KeptFigures:
        """The figures of now."""
        found = (len(kept), kept.chunks, kept.nbytes, kept.hits, kept.misses)
        files = kept.files
        if files is None:
            return cls(*found)
        return cls(*found, files.hits, files.read_bytes, files.written_bytes)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the engine holds.

    Attributes:
        state: of the engine.
        queued, running: answers that wait, and those that are being made.
        kept: prompts that may serve a next one.
        cache_bytes, cache_total_bytes: what conversations have reserved of the planned
            key-value cache.
        tokens_per_second: over all answers, lately.
        runtime: the runtime's own figures; ``None`` before there is one.
        fast_path: how single tokens go through the model, with ``summary`` and ``to_json``; ``None``
            where the runtime does not say.
    """

    state: State = "loading"
    queued: int = 0
    running: int = 0
    kept: KeptFigures = KeptFigures()
    cache_bytes: int = 0
    cache_total_bytes: int = 0
    tokens_per_second: float = 0.0
    runtime: RuntimeStats | None = None
    fast_path: Any = None


@dataclass(slots=True)
class Counts:
    """Sums since the start."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float = 0.0
    first_token_buckets: list[int] = field(
        default_factory=lambda: [0] * (len(FIRST_TOKEN_BUCKETS) + 1)
    )


class Metrics:
    """Counts, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    def request(self, endpoint: str, status: int) -> None:
        """A response was begun."""
        with self._lock:
            self._counts.requests[endpoint, status] += 1

    def first_token(self, seconds: float) -> None:
        """From the request to the first token of its answer, waiting included."""
        with self._lock:
            self._counts.first_token_seconds += seconds
            place = next(
                (i for i, bound in enumerate(FIRST_TOKEN_BUCKETS) if seconds <= bound),
                len(FIRST_TOKEN_BUCKETS),
            )
            self._counts.first_token_buckets[place] += 1

    def answer(self, outcome: Outcome, prompt: int, cached: int, completion: int) -> None:
        """An answer is over."""
        with self._lock:
            self._counts.answers[outcome] += 1
            self._counts.prompt_tokens += prompt
            self._counts.cached_tokens += cached
            self._counts.completion_tokens += completion

    def totals(self) -> dict[str, int]:
        """What the page shows."""
        with self._lock:
            return {
                "answers": sum(self._counts.answers.values()),
                "prompt_tokens": self._counts.prompt_tokens,
                "completion_tokens": self._counts.completion_tokens,
            }

    def text(self, now: Snapshot, model: str, intake: Intake) -> str:
        """Everything, in Prometheus' text format."""
        with self._lock:
            lines = [*self._responses(), *self._counted(), *taken_in(intake), *_held(now)]
        info = f'conmoe_model_info{{model="{escaped(model)}"}} 1'
        return "\n".join([*family("conmoe_model_info", "gauge", "The model."), info, *lines, ""])

    def responses(self) -> list[str]:
        """Those of them that are about responses."""
        with self._lock:
            return list(self._responses())

    def _responses(self) -> Iterable[str]:
        yield from family("conmoe_requests_total", "counter", "HTTP responses.")
        for (endpoint, status), count in sorted(self._counts.requests.items()):
            yield f'conmoe_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}'

    def _counted(self) -> Iterable[str]:
        counts = self._counts
        yield from family("conmoe_answers_total", "counter", "Answers by how they ended.")
        for outcome in ("stop", "length", "cancelled", "failed"):
            yield f'conmoe_answers_total{{outcome="{outcome}"}} {counts.answers[outcome]}'
        yield from single(
            "conmoe_prompt_tokens_total", "counter", "Tokens of prompts.", counts.prompt_tokens
        )
        yield from single(
            "conmoe_prompt_tokens_cached_total",
            "counter",
            "Tokens of prompts that an earlier conversation had computed.",
            counts.cached_tokens,
        )
        yield from single(
            "conmoe_completion_tokens_total",
            "counter",
            "Tokens of answers.",
            counts.completion_tokens,
        )
        name = "conmoe_first_token_seconds"
        yield from family(name, "histogram", "From the request to its first token.")
        below = 0
        for bound, count in zip(FIRST_TOKEN_BUCKETS, counts.first_token_buckets, strict=False):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        total = sum(counts.first_token_buckets)
        yield f'{name}_bucket{{le="+Inf"}} {total}'
        yield f"{name}_sum {counts.first_token_seconds:.6f}"
        yield f"{name}_count {total}"


def taken_in(intake: Intake) -> Iterable[str]:
    """What requests hold."""
    yield from single("conmoe_bodies", "gauge", "Bodies that are being read.", intake.reading)
    yield from single("conmoe_requests", "gauge", "Requests that hold a place.", intake.inside)
    yield from single("conmoe_request_bytes", "gauge", "Held by requests.", intake.used)


def _held(now: Snapshot) -> Iterable[str]:
    yield from single("conmoe_ready", "gauge", "1 once the model is there.", now.state == "ready")
    yield from single("conmoe_queue_length", "gauge", "Answers that wait.", now.queued)
    yield from single("conmoe_running", "gauge", "Answers being made.", now.running)
    yield from _kept(now.kept)
    yield from single(
        "conmoe_kv_cache_reserved_bytes", "gauge", "Reserved of the cache.", now.cache_bytes
    )
    yield from single(
        "conmoe_kv_cache_bytes", "gauge", "Planned for the cache.", now.cache_total_bytes
    )
    yield from single(
        "conmoe_tokens_per_second", "gauge", "Over all answers, lately.", now.tokens_per_second
    )
    if now.runtime is None:
        return
    stats = now.runtime
    path = "" if now.fast_path is None else now.fast_path.summary
    name = "conmoe_compute_info"
    yield from family(name, "gauge", "The experts' kernel, and how single tokens are computed.")
    yield f'{name}{{kernel="{escaped(stats.kernel)}",fast_path="{escaped(path)}"}} 1'
    name = "conmoe_prototype_requests_total"
    yield from family(name, "counter", "Prototypes asked for, by where they were.")
    yield f'{name}{{tier="device"}} {stats.hits}'
    yield f'{name}{{tier="below"}} {stats.misses}'
    name = "conmoe_prototype_bytes_total"
    yield from family(name, "counter", "Bytes of prototypes brought to the device, by tier.")
    yield f'{name}{{tier="disk"}} {stats.disk_bytes}'
    yield f'{name}{{tier="host"}} {stats.host_bytes}'
    yield from single(
        "conmoe_waited_seconds_total",
        "counter",
        "That computing stood still for prototypes.",
        stats.waited_seconds,
    )
    yield from single("conmoe_prototypes", "gauge", "Prototypes of the package.", stats.prototypes)
    yield from single(
        "conmoe_prototypes_resident", "gauge", "What the cache slots hold at once.", stats.resident
    )
    yield from single("conmoe_slot_bytes", "gauge", "Memory of the cache slots.", stats.slot_bytes)
    yield from single("conmoe_memory_bytes", "gauge", "Device memory in use.", stats.memory_used)
    if stats.memory_budget is not None:
        yield from single("conmoe_memory_budget_bytes", "gauge", "The budget.", stats.memory_budget)


def _kept(now: KeptFigures) -> Iterable[str]:
    yield from single("conmoe_kept", "gauge", "Prompts kept for a next request.", now.prompts)
    yield from single("conmoe_kept_chunks", "gauge", "Their chunks.", now.chunks)
    yield from single("conmoe_kept_bytes", "gauge", "Their keys and values.", now.nbytes)
    name = "conmoe_kept_lookups_total"
    yield from family(
        name, "counter", "Prompts of more than a chunk, by whether a beginning was known."
    )
    yield f'{name}{{found="yes"}} {now.hits}'
    yield f'{name}{{found="no"}} {now.misses}'
    yield from single(
        "conmoe_prompt_files_read_total",
        "counter",
        "Chunks of prompts read from files.",
        now.file_hits,
    )
    name = "conmoe_prompt_file_bytes_total"
    yield from family(name, "counter", "Bytes of kept prompts' files, by what was done.")
    yield f'{name}{{done="read"}} {now.file_bytes_read}'
    yield f'{name}{{done="written"}} {now.file_bytes_written}'


def single(name: str, kind: str, text: str, value: float) -> Iterable[str]:
    """A family of one sample."""
    yield from family(name, kind, text)
    yield f"{name} {value:.6f}" if isinstance(value, float) else f"{name} {int(value)}"


def family(name: str, kind: str, text: str) -> Iterable[str]:
    """What stands before the samples of a name."""
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def escaped(value: str) -> str:
    """As the value of a label."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
