"""Prompts kept for a next request."""

from __future__ import annotations

from conmoe_edge.offload.generation.sequence import reusable


def test_only_whole_chunks_are_used_again_and_one_token_is_left() -> None:
    held = list(range(10))
    assert reusable(held, list(range(10)), 4) == 8
    assert reusable(held, list(range(8)), 4) == 4
    assert reusable(held, [0, 1, 2, 3, 4, 9, 9], 4) == 4
    assert reusable(held, [5, 6], 4) == 0
