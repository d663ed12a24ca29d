"""Which record lies whole in which cache slot, for the operator to look up by itself.

The cache policy knows where a prototype has a place; whether it has come there is another matter: between the two lie
reads that are under way, and reads that have failed. A slot's record is ``arrived`` from when it was waited for until
something else is read into the slot. ``Residency`` says both.

Memory: some addresses a prototype. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from conmoe_edge.offload.native import PrototypeTable
from conmoe_edge.offload.slots import SlotPool


class Presence:
    """Of the prototypes with numbers below ``count`` in the slots of ``pools``, in the memory of a processor.

    ``addresses``: of those that are there and that one call of the operator takes (``StoredExpert.matrices``).
    """

    def __init__(self, pools: Sequence[SlotPool], count: int) -> None:
        """Nothing is there."""
        self.addresses = PrototypeTable(count)
        self._pools = pools
        self._holders: list[list[int | None]] = [[None] * pool.slots for pool in pools]

    def arrived(self, number: int, layout: int, slot: int) -> None:
        """The slot has the record of prototype ``number``, whole."""
        if self._holders[layout][slot] == number:
            return
        self._holders[layout][slot] = number
        matrices = self._pools[layout].parts(slot).matrices
        if matrices is not None:
            self.addresses.put(number, *matrices)

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
