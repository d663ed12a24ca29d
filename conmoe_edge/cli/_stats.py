"""What a chat says about itself in numbers: the footer, ``/stats``, ``/cache``, ``/context``, and
the JSON of ``--json``.

``read_stats`` is the only place that knows how ``ChatSession`` and the runtime name things; the
rest are pure functions of the frozen ``ChatStats``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from conmoe_edge.cli._text import counted, duration, percent_whole
from conmoe_edge.units import GIB, human_size

if TYPE_CHECKING:
    from conmoe_edge.offload.generate import ChatSession


@dataclass(frozen=True, slots=True)
class ChatStats:
    """The last answer and the memory it ran in.

    ``tier`` is what the device memory is called; ``hit_rate`` is the share of prototypes that were
    in memory when they were needed, ``None`` where none was needed yet.
    """

    tokens: int
    prompt_tokens: int
    tokens_per_second: float
    first_token_seconds: float
    hit_rate: float | None
    bytes_read: int
    used_bytes: int
    budget_bytes: int
    tier: str
    prototypes: int
    slots: int
    context_used: int
    context: int

    @property
    def resident_share(self) -> float:
        """Share of the prototypes that the cache slots hold at once."""
        return min(1.0, self.slots / self.prototypes) if self.prototypes else 1.0


def footer(stats: ChatStats) -> str:
    """The line under an answer."""
    cache = f"prototypes {percent_whole(stats.resident_share)} resident"
    if stats.hit_rate is not None:
        cache += f", hit {percent_whole(stats.hit_rate)}"
    return " · ".join(
        (
            counted(stats.tokens, "token"),
            f"{stats.tokens_per_second:.1f} tok/s",
            f"first token {duration(stats.first_token_seconds)}",
            memory_text(stats),
            cache,
            f"context {stats.context_used:,}/{stats.context:,}",
        )
    )


def memory_text(stats: ChatStats) -> str:
    """Used of budget in the unit that reads best: ``RAM 3.10/3.73 GiB``."""
    unit, name = (GIB, "GiB") if stats.budget_bytes >= GIB else (1 << 20, "MiB")
    digits = 2 if unit == GIB else 0
    used, budget = stats.used_bytes / unit, stats.budget_bytes / unit
    return f"{stats.tier} {used:.{digits}f}/{budget:.{digits}f} {name}"


def stats_rows(stats: ChatStats) -> list[tuple[str, str]]:
    """``/stats``: the last answer, a figure a line."""
    return [
        ("answer", counted(stats.tokens, "token")),
        ("question", f"{counted(stats.prompt_tokens, 'token')} that were new to the model"),
        ("speed", f"{stats.tokens_per_second:.2f} tokens a second"),
        ("first token", f"after {duration(stats.first_token_seconds)}"),
        ("memory", f"{memory_text(stats)} of the budget"),
        ("read from below", human_size(stats.bytes_read)),
    ]


def cache_rows(stats: ChatStats) -> list[tuple[str, str]]:
    """``/cache``: where the prototypes are and how often they were there."""
    resident = min(stats.slots, stats.prototypes)
    hit = "not known yet" if stats.hit_rate is None else f"{100 * stats.hit_rate:.1f} % of requests"
    return [
        ("prototypes", f"{stats.prototypes:,}"),
        ("cache slots", f"{stats.slots:,}"),
        ("resident", f"{resident:,} at once ({percent_whole(stats.resident_share)})"),
        ("found in memory", hit),
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
    return {**asdict(stats), "resident_share": stats.resident_share}


def read_stats(session: ChatSession) -> ChatStats:
    """The figures of now."""
    raise NotImplementedError
