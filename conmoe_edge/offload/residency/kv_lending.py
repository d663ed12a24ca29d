"""Cache slots in the room that the key-value cache does not need yet. Arithmetic only, no torch.

The plan keeps room for the cache of a whole context. Until a conversation is that long, part of it serves as further
cache slots; before the cache grows they are given back, so that slots and cache together never take more than was
planned for them:

    bytes of lent slots + cache bytes at the tokens there are <= cache bytes at the planned context

What was given back stays given back: another key-value cache may be alive, which is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from conmoe_edge.units import round_up


class Lending:
    """How many slots beyond the planned ones each record layout may have now."""

    def __init__(
        self,
        cache_bytes: Callable[[int], int],
        context: int,
        step: int,
        records: Sequence[tuple[int, int]],
    ) -> None:
        """Nothing is lent before the first ``allow``.

        Args:
            cache_bytes: of the key-value cache at so many tokens, one conversation.
            context: tokens that the cache is planned for.
            step: the cache's buffers grow by so many tokens.
            records: ``(bytes of a record, prototypes without a planned slot)`` of every layout.
        """
        self._cache_bytes = cache_bytes
        self._context = context
        self._step = step
        self._records = tuple(records)
        self.slots: tuple[int, ...] | None = None

    def allow(self, tokens: int) -> bool:
        """Leave room for ``tokens`` tokens from now on; says whether ``slots`` became fewer."""
        held = min(self._context, round_up(tokens, self._step))
        left = self._cache_bytes(self._context) - self._cache_bytes(held)
        fitting = []
        for i, (nbytes, wanted) in enumerate(self._records):
            most = wanted if self.slots is None else self.slots[i]
            fitting.append(min(most, left // nbytes))
            left -= fitting[i] * nbytes
        before, self.slots = self.slots, tuple(fitting)
        return before is not None and before != self.slots
