"""A bounded queue that is first come first served for each client, and round-robin
between clients. No threads, no clock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Requests by client. A client with many requests does not keep another one waiting for all of
    them.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()  # the next client first
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether nothing more is taken in."""
        return self._count >= self.longest

    def add(self, client: str, item: T) -> None:
        """Line up behind the client's own. A new client comes after all that wait."""
        assert not self.full, "asked before it was added"
        self._lines.setdefault(client, deque()).append(item)
        self._count += 1

    def first(self) -> T | None:
        """The next one, which stays where it is; ``None`` where there is none."""
        for line in self._lines.values():
            return line[0]
        return None

    def pop(self) -> T:
        """Take the next; its client goes to the end of the round."""
        client, line = next(iter(self._lines.items()))
        item = line.popleft()
        self._count -= 1
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        return item

    def remove(self, item: T) -> bool:
        """Take one out, wherever it stands; False where it is not here."""
        for client, line in self._lines.items():
            if item in line:
                line.remove(item)
                self._count -= 1
                if not line:
                    del self._lines[client]
                return True
        return False

    def __contains__(self, item: T) -> bool:
        return any(item in line for line in self._lines.values())

    def drain(self) -> list[T]:
        """Everything, and nothing is left."""
        items = []
        while self._count:
            items.append(self.pop())
        return items
