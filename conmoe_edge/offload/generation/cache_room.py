"""How many conversations the planned key-value cache has room for. Arithmetic only, no torch.

The plan keeps room for the cache of one conversation of ``context`` tokens. Here several share it:

    sum over conversations of cache bytes at their reserved tokens <= cache bytes at the context

Each reserves when it starts what it may come to, prompt and longest answer, in the steps in which the
buffers grow, so no answer is stopped half-way for want of room. Bytes are added up and not tokens: a
sliding window or a recurrent state costs each conversation the same from its first token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from conmoe_edge.units import round_up


class Room:
    """The ledger of one model's key-value cache."""

    def __init__(
        self, context: int, step: int, cache_bytes: Callable[[int], int] | None = None
    ) -> None:
        """``cache_bytes`` of a conversation at so many tokens; by default (``counts_tokens``) one for each token."""
        self.context = context
        self._step = step
        self.counts_tokens = cache_bytes is None
        self._cache_bytes = functools.cache(cache_bytes or int)
        self.total = self._cache_bytes(context)
        self.used = 0

    def tokens(self, wanted: int) -> int:
        """What a conversation of ``wanted`` tokens reserves."""
        return min(self.context, round_up(wanted, self._step))

    def nbytes(self, tokens: int) -> int:
        """Bytes of a reservation of so many tokens."""
        return self._cache_bytes(tokens)

    def fits(self, nbytes: int) -> bool:
        """Whether so many bytes are free."""
        return self.used + nbytes <= self.total

    def take(self, nbytes: int) -> None:
        """Reserve."""
        assert self.fits(nbytes), "asked before it was taken"
        self.used += nbytes

    def give_back(self, nbytes: int) -> None:
        """A conversation is over."""
        self.used -= nbytes
        assert self.used >= 0, "what was taken is given back once"

    def worth(self, beside: int = 0) -> int:
        """The length of the single conversation that takes what all of them have reserved and ``beside``: what the
        runtime has to leave room for.
        """
        wanted = min(self.total, self.used + beside)
        low, high = 0, self.context
        while low < high:
            middle = (low + high) // 2
            if self._cache_bytes(middle) >= wanted:
                high = middle
            else:
                low = middle + 1
        return low
