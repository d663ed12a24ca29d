"""Records on their way on a CPU: what is counted, what is waited for."""

from __future__ import annotations

import os
import threading
from concurrent.futures import CancelledError
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
    wait = transfer_module._Read.wait

    def waiting(read: Any) -> None:
        store.go.set()
        wait(read)

    monkeypatch.setattr(transfer_module._Read, "wait", waiting)


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


class _Noted(_Held):
    """Says what is read, in order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.begun: list[int] = []
        self.reading = threading.Event()

    def read_into(self, number: int, target: torch.Tensor) -> None:
        self.begun.append(number)
        self.reading.set()
        super().read_into(number, target)


def test_reads_that_are_begun_together_wake_one_thread(
    store: _Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = _Noted(tmp_path, store._prototypes, store._layouts)
    noted.go = threading.Event()
    transfer = DirectTransfer(noted, readers=1)
    transfer.load(0, (0, 0), host_buffer(LAYOUT.nbytes))
    assert noted.reading.wait(PATIENCE)
    woken: list[Any] = []
    submit = transfer._reading._threads.submit

    def counted(job: Any) -> Any:
        woken.append(job)
        return submit(job)

    monkeypatch.setattr(transfer._reading._threads, "submit", counted)
    for place, number in enumerate((2, 1, 2, 0, 1), start=1):
        transfer.load(number, (0, place), host_buffer(LAYOUT.nbytes))
    assert len(woken) == 1
    noted.go.set()
    transfer.drain()
    assert noted.begun == [0, 2, 1, 2, 0, 1], "in the order in which they were begun"
    transfer.close()


def test_several_threads_read_what_is_begun_together(store: _Held) -> None:
    """Each read waits for the others: with fewer threads at work none would end."""
    meet = threading.Barrier(3)
    read = store.read_into

    def together(number: int, target: torch.Tensor) -> None:
        meet.wait(PATIENCE)
        read(number, target)

    store.read_into = together  # type: ignore[method-assign]
    store.go.set()
    transfer = DirectTransfer(store, readers=3)
    for _ in range(20):
        for number in range(3):
            transfer.load(number, (0, number), host_buffer(LAYOUT.nbytes))
        for number in range(3):
            transfer.wait((0, number))
    transfer.close()


def test_reads_that_a_closed_transfer_did_not_begin_are_told_of(store: _Held) -> None:
    transfer = DirectTransfer(store, readers=1)
    begun = threading.Event()
    read = store.read_into

    def noted(number: int, target: torch.Tensor) -> None:
        begun.set()
        read(number, target)

    store.read_into = noted  # type: ignore[method-assign]
    transfer.load(0, (0, 0), host_buffer(LAYOUT.nbytes))
    assert begun.wait(PATIENCE)
    transfer.load(1, (0, 1), host_buffer(LAYOUT.nbytes))
    closing = threading.Thread(target=transfer.close)
    closing.start()
    with pytest.raises(CancelledError):
        transfer.wait((0, 1))
    store.go.set()
    closing.join(PATIENCE)
    transfer.wait((0, 0))
