"""What a chat says of a prompt that was known."""

from __future__ import annotations

from dataclasses import replace

from conmoe_edge.cli.chat_loop.chat_stats import ChatStats, footer, stats_json, stats_rows

STATS = ChatStats(
    answered=True,
    tokens=5,
    prompt_tokens=66,
    tokens_per_second=3.0,
    first_token_seconds=0.5,
    hit_rate=None,
    bytes_read=0,
    finish="stop",
    used_bytes=1 << 30,
    budget_bytes=None,
    tier="RAM",
    prototypes=0,
    resident=0,
    slots=0,
    context_used=1305,
    context=4096,
    kernel="",
    fast_path="",
)


def test_how_much_of_a_prompt_was_known() -> None:
    known = replace(STATS, known_tokens=1234)
    assert "· prompt: 1,234 of 1,300 tokens were known ·" in footer(known)
    assert ("known before", "1,234 tokens") in stats_rows(known)
    assert stats_json(known)["known_tokens"] == 1234


def test_nothing_is_said_where_nothing_was() -> None:
    assert "prompt" not in footer(STATS)
    assert "known before" not in dict(stats_rows(STATS))
