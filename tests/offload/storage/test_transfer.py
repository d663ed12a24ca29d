"""Records on their way on a CPU: what is counted, what is waited for."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.format.manifest import ExpertId, PrototypeEntry, RecordLayout
from conmoe_edge.errors import PackageError
from conmoe_edge.offload.storage import transfer as transfer_module
from conmoe_edge.offload.storage.record_store import RecordStore
from conmoe_edge.offload.storage.slot_pool import host_buffer
from conmoe_edge.offload.storage.transfer import DirectTransfer, QueuedTransfer
from tests.patience import PATIENCE

LAYOUT = RecordLayout("source", (), 8192)


class _Held(RecordStore):
    """A store whose reads wait for ``go``."""

    go: threading.Event

    def read_into(self, number: int, target: torch.Tensor) -> None:
        assert self.go.wait(PATIENCE)
        super().read_into(number, target)


@pytest.fixture
def store(tmp_path: Path) -> _Held:
    (tmp_path / "p.bin").write_bytes(os.urandom(3 * LAYOUT.nbytes))
    entries = [
        PrototypeEntry(ExpertId(0, i), "p.bin", i * LAYOUT.nbytes, 0, 0.0) for i in range(4)
    ]  # the last one is not there
    store = _Held(tmp_path, entries, [LAYOUT])
    store.go = threading.Event()
    return store


def _go_on_when_waited_for(store: _Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads go on from the moment that one is waited for."""
    wait = transfer_module.wait_for_futures

    def waiting(futures: Any) -> Any:
        store.go.set()
        return wait(futures)

    monkeypatch.setattr(transfer_module, "wait_for_futures", waiting)


def test_ready_when_waiting_would_take_no_time(
    store: _Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = DirectTransfer(store)
    target = host_buffer(LAYOUT.nbytes)
    assert transfer.ready((0, 0)), "nothing is on its way"
    transfer.load(1, (0, 0), target)
    assert not transfer.ready((0, 0)) and transfer.ready((0, 1))
    _go_on_when_waited_for(store, monkeypatch)
    transfer.wait((0, 0))
    assert transfer.ready((0, 0))
    assert transfer.counts.waited_seconds > 0
    waited = transfer.counts.waited_seconds
    transfer.wait((0, 0))
    transfer.load(2, (0, 0), target)
    while not transfer.ready((0, 0)):
        pass
    transfer.wait((0, 0))
    assert transfer.counts.waited_seconds == waited, "a read that is over is not waited for"
    assert transfer.counts.disk_bytes == 2 * LAYOUT.nbytes and transfer.counts.host_bytes == 0
    transfer.counts.reset()
    assert transfer.counts.disk_bytes == 0 == transfer.counts.waited_seconds
    transfer.close()


def test_draining_waits_for_reads_and_swallows_what_became_of_them(
    store: _Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = DirectTransfer(store)
    transfer.load(3, (0, 0), host_buffer(LAYOUT.nbytes))
    _go_on_when_waited_for(store, monkeypatch)
    transfer.drain()
    assert transfer.ready((0, 0))
    transfer.wait((0, 0))  # forgotten
    transfer.load(3, (0, 0), host_buffer(LAYOUT.nbytes))
    with pytest.raises(PackageError):
        transfer.wait((0, 0))
    transfer.close()


def test_other_gpus_get_records_by_a_buffer_and_a_copy(store: _Held) -> None:
    """The processor's memory stands in for the device's: a copy goes the same way."""
    transfer = QueuedTransfer(store, LAYOUT.nbytes)
    store.go.set()
    wanted = Path(store._folder / "p.bin").read_bytes()
    targets = [torch.zeros(LAYOUT.nbytes, dtype=torch.uint8) for _ in range(3)]
    for number, target in enumerate(targets):
        transfer.load(number, (0, number), target, ahead=number == 2)
    for number, target in enumerate(targets):
        transfer.wait((0, number))
        start = number * LAYOUT.nbytes
        assert bytes(target.numpy()) == wanted[start : start + LAYOUT.nbytes]
    assert transfer.counts.disk_bytes == 3 * LAYOUT.nbytes
    transfer.load(3, (0, 0), targets[0])
    with pytest.raises(PackageError):
        transfer.wait((0, 0))
    transfer.close()


def test_a_read_for_another_gpu_can_be_taken_back(store: _Held) -> None:
    transfer = QueuedTransfer(store, LAYOUT.nbytes, readers=1)
    target = torch.zeros(LAYOUT.nbytes, dtype=torch.uint8)
    transfer.load(0, (0, 0), target)
    transfer.load(1, (0, 1), target)  # waits behind the other
    assert transfer.cancel(1, (0, 1), target)
    assert transfer.counts.disk_bytes == LAYOUT.nbytes
    store.go.set()
    transfer.drain()
    transfer.close()
