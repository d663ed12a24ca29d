"""Caches of prompts whose answers are over, for a next prompt that begins the same.

Only a prompt's whole chunks are used again (``CachedTokens.reusable``): an answer must not depend on earlier requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.serve.room import Room


@dataclass(frozen=True, slots=True)
class KeptPrompt:
    """A cache, and the bytes of the room that it takes."""

    cached: CachedTokens
    reserved: int


class KeptPrompts:
    """The kept caches; each holds its bytes of ``room`` until it is taken or dropped."""

    def __init__(self, room: Room) -> None:
        """``room``: what answers and kept prompts share."""
        self._room = room
        self._prompts: list[KeptPrompt] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def reserved(self) -> int:
        """Bytes of the room that all of them take."""
        return sum(one.reserved for one in self._prompts)

    def add(self, cached: CachedTokens, reserved: int) -> None:
        """Keep the whole chunks of a prompt; where it has none, its room is free."""
        cached.keep(cached.whole)
        if cached.held:
            self._prompts.append(KeptPrompt(cached, reserved))
        else:
            cached.forget()
            self._room.give_back(reserved)

    def take(self, tokens: Sequence[int]) -> KeptPrompt | None:
        """The one that has most in common with ``tokens``, without its room; ``None`` where none
        begins as they do.
        """
        best = max(self._prompts, key=lambda one: one.cached.reusable(tokens), default=None)
        if best is None or not best.cached.reusable(tokens):
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

    def _drop(self, kept: KeptPrompt) -> None:
        self._prompts.remove(kept)
        self._room.give_back(kept.reserved)
