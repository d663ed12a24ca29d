"""Stop strings in text that comes by pieces."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.offload.generation.stop_strings import StopFilter


@given(
    text=st.text("ab.", max_size=40),
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
def test_stops_cut_where_they_would_in_the_whole_text(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    filtered = StopFilter(stops)
    out = "".join(filtered.add(text[a:b]) for a, b in itertools.pairwise(bounds))
    out += "" if filtered.hit else filtered.finish()
    # By hand: the first end of the text, letter by letter, at which some stop string is complete.
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    if not ends:
        assert (out, filtered.hit) == (text, False)
        return
    assert filtered.hit
    assert all(stop not in out for stop in stops)
    assert text.startswith(out)
    assert any(text[len(out) :].startswith(stop) for stop in stops)


def test_what_cannot_become_a_stop_is_given_out_at_once() -> None:
    filtered = StopFilter(["END"])
    assert [filtered.add(piece) for piece in ("a", "bE", "N", "x", "EN")] == [
        "a",
        "b",
        "",
        "ENx",
        "",
    ]
    assert filtered.finish() == "EN"
