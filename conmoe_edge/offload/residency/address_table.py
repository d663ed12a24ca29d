"""Where every prototype lies: the one table that the cache, the residency and the operators read.

A prototype is *absent*, or has a place and is *arriving* there, or *present*: its record
was waited for, and nothing else has been read into its place since. ``SlotCache`` assigns places and takes them away,
``Residency`` says when a record is there.

Who needs the table in a form of its own (the pointer tables of the operators) is a *view*: it is told of every
prototype that becomes present, and of every one that ceases to be, before anything else is read into its place. Nothing
else writes to a view, so it cannot disagree with the table.

Plain numbers. Memory: some numbers a cache slot.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from conmoe_edge.offload.storage.place import Place


class AddressView(Protocol):
    """Where the present prototypes lie, in another form."""

    def put(self, number: int, place: Place) -> None:
        """The prototype is present."""

    def remove(self, number: int) -> None:
        """It is not any more."""


class AddressTable:
    """Places of prototypes by their numbers.

    Attributes:
        arriving: the prototypes whose place does not have their record yet. To be read only.
        pinned: those that are never given up.
    """

    def __init__(self) -> None:
        """Nothing has a place."""
        self.arriving: set[int] = set()
        self.pinned: frozenset[int] = frozenset()
        self._places: dict[int, Place] = {}
        self._holders: dict[Place, int] = {}
        self._views: list[AddressView] = []

    def place(self, number: int) -> Place | None:
        """The place of a prototype, arriving or present; ``None`` where it is absent."""
        return self._places.get(number)

    def present(self, numbers: Iterable[int]) -> bool:
        """Whether all of them are present."""
        places, arriving = self._places, self.arriving
        return all(number in places and number not in arriving for number in numbers)

    def stay(self, numbers: Iterable[int]) -> bool:
        """Whether all of them are present and pinned."""
        return self.present(numbers) and self.pinned.issuperset(numbers)

    def placed(self, layout: int) -> frozenset[int]:
        """The prototypes with a place of this layout."""
        return frozenset(number for number, place in self._places.items() if place[0] == layout)

    def watch(self, view: AddressView) -> None:
        """Tell ``view`` what is present, and of every change from now on."""
        for number, place in self._places.items():
            if number not in self.arriving:
                view.put(number, place)
        self._views.append(view)

    def pin(self, numbers: Iterable[int]) -> None:
        """These are never given up."""
        self.pinned |= frozenset(numbers)

    def assign(self, number: int, place: Place) -> None:
        """An absent prototype is arriving at a place that nothing else has.

        Raises:
            RuntimeError: it has a place, or the place is another's.
        """
        if number in self._places or place in self._holders:
            raise RuntimeError(f"prototype {number} cannot have the place {place}")
        self._places[number] = place
        self._holders[place] = number
        self.arriving.add(number)

    def arrived(self, number: int) -> None:
        """The place of an arriving prototype has its record; nothing happens where it was present."""
        if number in self.arriving:
            self.arriving.remove(number)
            for view in self._views:
                view.put(number, self._places[number])

    def free(self, number: int) -> Place:
        """A prototype with a place is absent from now on; returns the place."""
        place = self._places.pop(number)
        del self._holders[place]
        if number in self.arriving:
            self.arriving.remove(number)
        else:
            for view in self._views:
                view.remove(number)
        return place

    def clear(self) -> None:
        """Everything is absent."""
        self.pinned = frozenset()
        for number in list(self._places):
            self.free(number)
