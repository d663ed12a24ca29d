"""Room in the planned key-value cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.offload.generation.cache_room import Room


@given(
    context=st.integers(1, 5000),
    window=st.integers(1, 3000),
    wanted=st.lists(st.integers(1, 6000), max_size=12),
)
def test_conversations_never_take_more_than_was_planned(
    context: int, window: int, wanted: list[int]
) -> None:
    def cache_bytes(tokens: int) -> int:  # one layer that sees all, one that sees a window
        return 7 * tokens + 5 * min(tokens, window)

    room = Room(context, 256, cache_bytes)
    taken: list[int] = []
    for tokens in wanted:
        reserved = room.tokens(tokens)
        assert min(tokens, context) <= reserved <= context
        nbytes = room.nbytes(reserved)
        if room.fits(nbytes):
            room.take(nbytes)
            taken.append(nbytes)
        assert sum(taken) <= cache_bytes(context)
        assert cache_bytes(room.worth()) >= room.used
        assert room.worth() == 0 or cache_bytes(room.worth() - 1) < room.used
    for nbytes in taken:
        room.give_back(nbytes)
    assert room.used == 0


def test_one_conversation_may_have_it_all() -> None:
    room = Room(1000, 256, lambda tokens: 3 * tokens)
    assert room.fits(room.nbytes(room.tokens(5000)))
