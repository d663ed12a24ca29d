"""Pools on devices that are not here, whose errors torch words in its own ways."""

from __future__ import annotations

import pytest
import torch

from conmoe_edge.checkpoint.format.manifest import RecordLayout
from conmoe_edge.errors import OutOfMemory
from conmoe_edge.offload.storage.slot_pool import SlotPool, can_shrink

LAYOUT = RecordLayout("source", (), 4096)
META = torch.device("meta")


def test_a_pool_on_a_device_is_one_tensor_of_it() -> None:
    pool = SlotPool(LAYOUT, 3, META)
    assert pool.record(2).device == META and pool.record(2).numel() == 4096
    assert pool.nbytes == 3 * 4096 and not can_shrink(META)


@pytest.mark.parametrize(
    "said",
    [
        "MPS backend out of memory (MPS allocated: 14.00 GB, other allocations: 1.00 GB)",
        "Invalid buffer size: 20.00 GiB",
        "XPU out of memory. Tried to allocate 20.00 GiB",
    ],
)
def test_every_way_of_saying_that_memory_ran_out(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(OutOfMemory, match="could not be allocated on meta"):
        SlotPool(LAYOUT, 3, META)


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(RuntimeError, match="no such kernel"):
        SlotPool(LAYOUT, 3, META)
