"""Which record lies whole in which cache slot, for an operator to look up by itself.

The cache policy knows where a prototype has a place; whether it has come there is another matter: between the two lie
reads that are under way, and reads that have failed. A slot's record is ``arrived`` from when it was waited for until
something else is read into the slot. ``Residency`` says both.

Memory: some addresses a prototype. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from conmoe_edge.offload.kernels.cpu.bindings import PrototypeTable
from conmoe_edge.offload.storage.slot_pool import SlotPool


class Addresses(Protocol):
    """Where prototypes lie, by their numbers, in the form that an operator reads."""

    def put(self, number: int, pool: SlotPool, slot: int) -> None:
        """The prototype's record is in ``slot``."""

    def remove(self, number: int) -> None:
        """It is there no more."""


class HostAddresses:
    """``Addresses`` for the operator of the processor.

    ``table``: of the prototypes that are there and that one call takes (``StoredExpert.matrices``).
    """

    def __init__(self, count: int) -> None:
        """Numbers below ``count``, none of them there."""
        self.table = PrototypeTable(count)

    def put(self, number: int, pool: SlotPool, slot: int) -> None:
        matrices = pool.parts(slot).matrices
        if matrices is not None:
            self.table.put(number, *matrices)

    def remove(self, number: int) -> None:
        self.table.remove(number)


class Presence:
    """The prototypes in the slots of ``pools``, told to ``addresses``."""

    def __init__(self, pools: Sequence[SlotPool], addresses: Addresses) -> None:
        """Nothing is there."""
        self.addresses = addresses
        self._pools = pools
        self._holders: list[list[int | None]] = [[None] * pool.slots for pool in pools]

    def arrived(self, number: int, layout: int, slot: int) -> None:
        """The slot has the record of prototype ``number``, whole."""
        if self._holders[layout][slot] == number:
            return
        self._holders[layout][slot] = number
        self.addresses.put(number, self._pools[layout], slot)

    def gone(self, layout: int, slot: int) -> None:
        """What the slot has is about to be overwritten."""
        number = self._holders[layout][slot]
        if number is not None:
            self._holders[layout][slot] = None
            self.addresses.remove(number)

    def keep(self, slot_of: Callable[[int], int | None]) -> None:
        """Forget all that do not have the slot that ``slot_of`` says."""
        for layout, holders in enumerate(self._holders):
            for slot, number in enumerate(holders):
                if number is not None and slot_of(number) != slot:
                    self.gone(layout, slot)
