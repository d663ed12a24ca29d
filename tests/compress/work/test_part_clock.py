"""Seconds by part: each counts once."""

from __future__ import annotations

import time

import pytest

from conmoe_edge.compress.work.part_clock import Clock


def test_an_inner_part_is_no_time_of_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    clock = Clock({"read": 1.0})
    with clock.part("survey"):
        wait(2.0)
        with clock.part("read"):
            wait(4.0)
            with clock.part("hub"):
                wait(8.0)
        wait(16.0)
        clock.add("journal", 0.5)  # of these 16
    wait(32.0)
    with clock.part("read"):
        wait(64.0)
    assert clock.seconds == {"read": 69.0, "hub": 8.0, "survey": 17.5, "journal": 0.5}


def test_a_part_that_fails_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    with pytest.raises(KeyError), clock.part("outer"), clock.part("inner"):
        raise KeyError
    assert clock.seconds == {"inner": 2.0, "outer": 4.0}
