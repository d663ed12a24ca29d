"""The queue of requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.serve.waiting import FairQueue


def test_a_client_with_many_requests_does_not_keep_another_waiting() -> None:
    line: FairQueue[str] = FairQueue(10)
    for item in ("a1", "a2", "a3"):
        line.add("a", item)
    line.add("b", "b1")
    line.add("c", "c1")
    assert line.remove("a2")
    assert not line.remove("a2")
    line.add("b", "b2")
    assert [line.pop() for _ in range(len(line))] == ["a1", "b1", "c1", "a3", "b2"]
    assert line.first() is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=30))
def test_each_client_is_served_in_its_own_order(items: list[tuple[str, int]]) -> None:
    line: FairQueue[tuple[str, int]] = FairQueue(30)
    for client, number in items:
        line.add(client, (client, number))
    out = line.drain()
    for client in "abc":
        assert [one for one in out if one[0] == client] == [
            one for one in items if one[0] == client
        ]
    assert len(line) == 0
