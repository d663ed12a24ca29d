"""What is there when a model is opened is looked at once; what comes later is still collected."""

from __future__ import annotations

import gc
import weakref

from conmoe_edge.memory.garbage import no_collections, settle


class _Knot:
    def __init__(self) -> None:
        self.self = self


def test_garbage_of_before_goes_and_so_does_garbage_of_later() -> None:
    before = weakref.ref(_Knot())
    settle()
    assert before() is None and gc.get_freeze_count() > 0
    there = gc.get_freeze_count()
    later = weakref.ref(_Knot())
    gc.collect()
    assert later() is None and gc.get_freeze_count() <= there  # what is set aside may still go


def test_collections_wait_and_come_back() -> None:
    with no_collections():
        assert not gc.isenabled()
        with no_collections():
            pass
        assert not gc.isenabled()  # the inner one leaves the outer one's wish
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()  # and the caller's own
    finally:
        gc.enable()
