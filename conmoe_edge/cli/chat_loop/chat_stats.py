"""What a chat says about itself in numbers: the footer, ``/stats``, ``/cache``, ``/context``, and
the JSON of ``--json``.

``read_stats`` is the only place that knows how ``ChatSession`` and the runtime name things; the
rest are pure functions of the frozen ``ChatStats``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from conmoe_edge.cli.ui.text import counted, duration, percent_whole
from conmoe_edge.units import human_size, unit_for

if TYPE_CHECKING:
    from conmoe_edge.offload.generation.session import ChatSession


@dataclass(frozen=True, slots=True)
class ChatStats:
    """The last answer and the memory it ran in.

    ``answered`` is false before the first answer; the figures of an answer are 0 then. ``tier`` is
    what the device memory is called. ``hit_rate`` is the share of prototypes that were in memory
    when the last answer needed them, ``None`` where it needed none. ``finish`` is the word of
    ``TurnStats``. ``kernel`` computes the experts; ``fast_path`` says how single tokens are computed,
    empty where the runtime does not say. ``known_tokens`` of the prompt were there from an earlier one, beside the
    ``prompt_tokens`` that were computed.
    """

    answered: bool
    tokens: int
    prompt_tokens: int
    tokens_per_second: float
    first_token_seconds: float
    hit_rate: float | None
    bytes_read: int
    finish: str
    used_bytes: int
    budget_bytes: int | None
    tier: str
    prototypes: int
    resident: int
    slots: int
    context_used: int
    context: int
    kernel: str
    fast_path: str
    known_tokens: int = 0

    @property
    def resident_share(self) -> float:
        """Share of the prototypes that the cache slots hold at once."""
        return self.resident / self.prototypes if self.prototypes else 1.0


def footer(stats: ChatStats) -> str:
    """The line under an answer."""
    return " · ".join(
        (
            counted(stats.tokens, "token"),
            f"{stats.tokens_per_second:.1f} tok/s",
            f"first token {duration(stats.first_token_seconds)}",
            *_known_text(stats),
            memory_text(stats),
            _cache_text(stats),
            f"context {stats.context_used:,}/{stats.context:,}",
        )
    )


def _known_text(stats: ChatStats) -> list[str]:
    """How much of the prompt did not have to be computed; nothing where all of it had to."""
    if not stats.known_tokens:
        return []
    total = stats.known_tokens + stats.prompt_tokens
    return [f"prompt: {stats.known_tokens:,} of {total:,} tokens were known"]


def loaded_line(stats: ChatStats) -> str:
    """The line after loading: what there is to talk to, and in what memory."""
    return " · ".join((memory_text(stats), _cache_text(stats), f"context {stats.context:,} tokens"))


def memory_text(stats: ChatStats) -> str:
    """Used of budget in the unit that reads best: ``RAM 3.10/3.73 GiB``."""
    unit = unit_for(stats.budget_bytes or stats.used_bytes)
    limit = "" if stats.budget_bytes is None else f"/{unit.text(stats.budget_bytes)}"
    return f"{stats.tier} {unit.text(stats.used_bytes)}{limit} {unit.name}"


def _cache_text(stats: ChatStats) -> str:
    if not stats.prototypes:
        return "all experts resident"
    text = f"prototypes {percent_whole(stats.resident_share)} resident"
    return text if stats.hit_rate is None else f"{text}, hit {percent_whole(stats.hit_rate)}"


def stats_rows(stats: ChatStats) -> list[tuple[str, str]]:
    """``/stats``: the last answer, a figure a line."""
    if not stats.answered:
        return [("no answer yet", ""), ("memory", memory_text(stats)), *_compute_rows(stats)]
    below = "the disk" if stats.tier == "RAM" else "RAM or the disk"
    return [
        ("answer", f"{counted(stats.tokens, 'token')}, ended by {_ENDED_BY[stats.finish]}"),
        ("question", f"{counted(stats.prompt_tokens, 'token')} that were new to the model"),
        *([("known before", counted(stats.known_tokens, "token"))] if stats.known_tokens else []),
        ("speed", f"{stats.tokens_per_second:.2f} tokens a second"),
        ("first token", f"after {duration(stats.first_token_seconds)}"),
        ("memory", memory_text(stats)),
        ("experts read", f"{human_size(stats.bytes_read)} from {below}"),
        *_compute_rows(stats),
    ]


def _compute_rows(stats: ChatStats) -> list[tuple[str, str]]:
    rows = [("kernel", stats.kernel if stats.prototypes else ""), ("fast path", stats.fast_path)]
    return [(name, value) for name, value in rows if value]


_ENDED_BY = {
    "stop": "the model",
    "length": "max_tokens",
    "context": "the end of the context",
    "interrupted": "you",
}


def cache_rows(stats: ChatStats) -> list[tuple[str, str]]:
    """``/cache``: where the prototypes are and how often they were there."""
    if not stats.prototypes:
        return [("experts", "all of them in memory: this model was not changed")]
    hit = "no answer yet" if stats.hit_rate is None else f"{100 * stats.hit_rate:.1f} %"
    resident = f"{stats.resident:,} at once ({percent_whole(stats.resident_share)})"
    return [
        ("prototypes", f"{stats.prototypes:,}"),
        ("cache slots", f"{stats.slots:,}"),
        ("resident", resident),
        ("found there", f"{hit} of the last answer's requests" if stats.answered else hit),
    ]


def context_line(stats: ChatStats) -> str:
    """``/context``: how full it is."""
    left = max(0, stats.context - stats.context_used)
    return (
        f"{stats.context_used:,} of {stats.context:,} tokens used, room for {left:,} more. "
        "/clear empties it."
    )


def stats_json(stats: ChatStats) -> dict[str, Any]:
    """The value of ``"stats"`` in ``--json`` mode."""
    value = asdict(stats)
    del value["answered"]
    return {**value, "resident_share": stats.resident_share}


def read_stats(session: ChatSession) -> ChatStats:
    """The figures of now."""
    turn, runtime = session.last, session.runtime.stats()
    path = session.runtime.fast_path
    asked = turn is not None and turn.hits + turn.misses > 0
    return ChatStats(
        answered=turn is not None,
        tokens=turn.tokens if turn else 0,
        prompt_tokens=turn.prompt_tokens if turn else 0,
        tokens_per_second=turn.tokens_per_second if turn else 0.0,
        first_token_seconds=turn.seconds_to_first if turn else 0.0,
        hit_rate=turn.hit_rate if turn and asked else None,
        bytes_read=turn.bytes_read if turn else 0,
        finish=turn.finish if turn else "",
        used_bytes=runtime.memory_used,
        budget_bytes=runtime.memory_budget,
        tier="RAM" if runtime.device == "cpu" else "GPU",
        prototypes=runtime.prototypes,
        resident=runtime.resident,
        slots=runtime.slots,
        context_used=session.context_used,
        context=session.context,
        kernel=runtime.kernel,
        fast_path="" if path is None else path.summary,
        known_tokens=turn.known_tokens if turn else 0,
    )
