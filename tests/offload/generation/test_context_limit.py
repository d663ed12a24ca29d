"""A full context is told with a way out that exists."""

from __future__ import annotations

from conmoe_edge.offload.generation.context_limit import context_full


def test_more_room_is_offered_as_far_as_the_model_goes() -> None:
    assert "--context 3072" in context_full(2100, 2048, 4096).fix
    assert "--context 4000" in context_full(3900, 2048, 4000).fix
    assert "--context 3072" in context_full(2100, 2048, None).fix


def test_beyond_the_model_no_context_is_offered() -> None:
    error = context_full(2100, 2048, 2048)
    assert "--context" not in error.fix and "2048" in error.why
