"""Caches of prompts whose answers are over, for a next prompt that begins the same.

Only a prompt's whole chunks, counted from its first token, are used again. What was computed in
other portions could differ in the last bit, and an answer must not depend on earlier requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conmoe_edge.offload.generation.sequence import CachedTokens, common_length
from conmoe_edge.serve.room import Room


@dataclass(frozen=True, slots=True)
class KeptPrompt:
    """A cache, and the bytes of the room that it takes."""

    cached: CachedTokens
    reserved: int


class KeptPrompts:
    """The kept caches; each holds its bytes of ``room`` until it is taken or dropped."""

    def __init__(self, room: Room, chunk: int) -> None:
        """``chunk`` is how many tokens of a prompt go through the model at a time."""
        self._room = room
        self._chunk = chunk
        self._prompts: list[KeptPrompt] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def reserved(self) -> int:
        """Bytes of the room that all of them take."""
        return sum(one.reserved for one in self._prompts)

    def add(self, cached: CachedTokens, prompt: int, reserved: int) -> None:
        """Keep the whole chunks of a prompt of ``prompt`` tokens; none of it where the cache was not
        filled by whole chunks, and then its room is free.
        """
        cached.keep(min(len(cached.held), prompt // self._chunk * self._chunk))
        if cached.held and cached.chunk == self._chunk and cached.in_chunks:
            self._prompts.append(KeptPrompt(cached, reserved))
        else:
            cached.forget()
            self._room.give_back(reserved)

    def take(self, tokens: Sequence[int]) -> KeptPrompt | None:
        """The one that has most in common with ``tokens``, without its room; ``None`` where none
        begins as they do.
        """
        best = max(self._prompts, key=lambda one: self.shared(one.cached, tokens), default=None)
        if best is None or not self.shared(best.cached, tokens):
            return None
        self._drop(best)
        return best

    def put_back(self, kept: KeptPrompt) -> None:
        """After ``take``, where it was not used; it takes its room again."""
        self._room.take(kept.reserved)
        self._prompts.append(kept)

    def drop_oldest(self) -> None:
        """Free the room of one of them."""
        self._drop(self._prompts[0])

    def drop_all(self) -> bool:
        """Free the room of all; whether there were any."""
        any_kept = bool(self._prompts)
        while self._prompts:
            self.drop_oldest()
        return any_kept

    def shared(self, cached: CachedTokens, tokens: Sequence[int]) -> int:
        """How much of ``cached`` an answer to ``tokens`` may begin with."""
        return reusable(cached.held, tokens, self._chunk)

    def _drop(self, kept: KeptPrompt) -> None:
        self._prompts.remove(kept)
        self._room.give_back(kept.reserved)


def reusable(held: Sequence[int], tokens: Sequence[int], chunk: int) -> int:
    """Tokens of a cache that an answer to ``tokens`` may begin with: the whole chunks in common. At
    least one token is left to compute.
    """
    return common_length(held, tokens[:-1]) // chunk * chunk
