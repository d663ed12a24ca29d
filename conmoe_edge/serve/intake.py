"""The account of everything that requests hold before they are answered, and one limit on how many there are.

A request is one ``Entry`` from the first byte of its body to the last of its answer. It holds bytes (of its body, then
of its texts, then of its tokens) out of a fixed number, and from the moment its body is there a place among a fixed
number. What finds no room is refused with 429, or pushes out what has less right to be there:

- an unfinished body that has brought nothing for the longest time, since a client that sends slowly is the only one
  that loses by it;
- else, where another client's line is longer, the newest of its requests that wait. A request takes a place for each
  answer that it wants. So a client with many requests cannot keep others out, whatever it sends.

Answers that are being made are never pushed out. All of it happens on the event loop's thread. Memory: what it counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from conmoe_edge.serve.busy import Busy

PROGRESS_BYTES = 1024
"""A body that has brought so much since it was last looked at has made progress."""


class Entry:
    """One request: the bytes it holds, and its place."""

    def __init__(self, intake: Intake, withdraw: Callable[[], bool]) -> None:
        self.held = 0
        self.client: str | None = None
        self.places = 1
        self._intake = intake
        self._withdraw = withdraw
        self._moved = time.monotonic()
        self._noted = 0

    @property
    def quiet_since(self) -> float:
        """When an unfinished body last made progress."""
        return self._moved

    def hold(self, nbytes: int) -> None:
        """Hold so many bytes instead of those of before.

        Raises:
            Busy: there is no room for them; what it held it still holds.
        """
        more = nbytes - self.held
        if more > 0:
            self._intake.find_room(self, more)
        self._intake.used += more
        self.held = nbytes
        if self.client is None and nbytes - self._noted >= PROGRESS_BYTES:
            self._moved, self._noted = time.monotonic(), nbytes

    def enter(self, client: str, places: int = 1) -> None:
        """The body is there: take a place in the client's line for each answer that it wants.

        Raises:
            Busy: all are taken, and nobody's line is longer.
        """
        self._intake.give_places(self, client, places)

    def on_withdraw(self, withdraw: Callable[[], bool]) -> None:
        """What takes it out of where it waits from now on, and says whether it could."""
        self._withdraw = withdraw

    def push_out(self) -> bool:
        """End it for another one's sake; False where it does not wait any more."""
        if not self._withdraw():
            return False
        self.close()
        return True

    def close(self) -> None:
        """It is over, however it ended: everything is given back. More than once does nothing more."""
        self._withdraw = _nothing
        self._intake.drop(self)


class Intake:
    """The account."""

    def __init__(
        self,
        nbytes: Callable[[], int],
        places: int,
        readers: int,
        estimate: Callable[[], int] = lambda: 1,
    ) -> None:
        """Nothing is held yet.

        Args:
            nbytes: that all requests may hold; asked only once bodies are read.
            places: requests whose body is there.
            readers: bodies that are read at once.
            estimate: seconds until it is worth to try again.
        """
        self._nbytes = nbytes
        self.used = 0
        self._places = places
        self._readers = readers
        self._estimate = estimate
        self._reading: dict[Entry, None] = {}
        self._lines: dict[str, list[Entry]] = {}
        self._inside = 0

    @property
    def reading(self) -> int:
        """Bodies that are being read."""
        return len(self._reading)

    @property
    def inside(self) -> int:
        """Places that are taken."""
        return self._inside

    @property
    def full(self) -> bool:
        """Whether all places are taken."""
        return self._inside >= self._places

    def begin(self, withdraw: Callable[[], bool]) -> Entry:
        """Begin to read a body. ``withdraw`` breaks that off, and says whether it could."""
        while len(self._reading) >= self._readers and self._push_out_reader(None):
            pass
        if len(self._reading) >= self._readers:
            raise self.busy()
        entry = Entry(self, withdraw)
        self._reading[entry] = None
        return entry

    def find_room(self, entry: Entry, more: int) -> None:
        """Room for ``more`` bytes of ``entry``, by pushing others out where that is needed.

        Raises:
            Busy: nobody has less right to be there.
        """
        while self.used + more > self._nbytes():
            if not self._push_out_reader(entry) and not self._push_out_waiting(entry.client):
                raise self.busy()

    def give_places(self, entry: Entry, client: str, places: int) -> None:
        """So many places in the line of ``client``.

        Raises:
            Busy: nobody has less right to them.
        """
        while self._inside + places > self._places:
            if not self._push_out_waiting(client, places):
                raise self.busy()
        self._reading.pop(entry, None)
        entry.client, entry.places = client, places
        self._lines.setdefault(client, []).append(entry)
        self._inside += places

    def drop(self, entry: Entry) -> None:
        """Everything of ``entry`` is free."""
        self.used -= entry.held
        entry.held = 0
        self._reading.pop(entry, None)
        line = self._lines.get(entry.client or "", ())
        if entry in line:
            assert isinstance(line, list) and entry.client is not None, "an entry in a line has one"
            line.remove(entry)
            self._inside -= entry.places
            if not line:
                del self._lines[entry.client]
        assert self.used >= 0 and self._inside >= 0, "what was taken is given back once"

    def busy(self) -> Busy:
        """Too much is held."""
        return Busy("full", self._estimate())

    def _push_out_reader(self, spared: Entry | None) -> bool:
        others = (one for one in self._reading if one is not spared)
        return any(one.push_out() for one in sorted(others, key=lambda one: one.quiet_since))

    def _push_out_waiting(self, client: str | None, places: int = 1) -> bool:
        """The newest of the longest line, where that stays as long as this client's will be."""
        own = _length(self._lines.get(client or "", ())) + places
        others = (line for name, line in self._lines.items() if name != client)
        longer = [line for line in others if _length(line) > own]
        for line in sorted(longer, key=_length, reverse=True):
            if any(one.push_out() for one in _beyond(line, own)):
                return True
        return False


def _length(line: Sequence[Entry]) -> int:
    return sum(entry.places for entry in line)


def _beyond(line: Sequence[Entry], places: int) -> list[Entry]:
    """Those that do not lie within the first ``places`` of a line, the newest first."""
    found, before = [], 0
    for entry in line:
        if before >= places:
            found.append(entry)
        before += entry.places
    return found[::-1]


def _nothing() -> bool:
    return False
