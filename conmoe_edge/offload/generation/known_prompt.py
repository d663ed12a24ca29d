"""The beginning of a prompt that is known: from the turn before, or from ``--prompt-cache``.

For one conversation at a time (``ChatSession``); a server has ``serve/kept_prompts.py`` for many. Memory: the cache,
and the ends of its last chunks where the room that was planned for the cache has a place for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conmoe_edge.offload.fastpath.kv_cache import STEP_TOKENS
from conmoe_edge.offload.generation.cache_room import Room
from conmoe_edge.offload.generation.prefix_chunks import ends_needed, form_of_model, standing_at
from conmoe_edge.offload.generation.prompt_files import DamagedPrompt, PromptFiles
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.runtime import Runtime


class KnownPrompt:
    """What ``cached`` may begin with."""

    def __init__(self, model: Any, cached: CachedTokens, files: PromptFiles | None = None) -> None:
        """``files``: what is kept over restarts."""
        self.files = files
        self._runtime: Runtime = model.conmoe
        self._cached = cached
        self._form = form_of_model(model)
        self._room = Room(self._runtime.context, STEP_TOKENS, self._runtime.cache_bytes)
        self._spare = 0
        self._first_end = 0
        cached.wants_end = lambda index: index >= self._first_end
        cached.may_keep_ends = self._may_keep_ends
        if files is not None:
            cached.on_chunk = files.write

    def begin(self, tokens: Sequence[int], longest: int) -> None:
        """Let the cache hold what is known of ``tokens``; prompt and answer come to at most ``longest`` tokens."""
        cached = self._cached
        longest = min(longest, self._room.context)
        self._spare = self._room.total - self._room.nbytes(self._room.tokens(longest))
        if cached.ends_bytes > self._spare:
            cached.forget_ends()
        cached.rewind(tokens)
        if self._form is not None:
            needed = ends_needed(self._form, cached.chunk)
            self._first_end = len(tokens) // cached.chunk - needed
        if self.files is None or self._form is None:
            return
        chunks = self.files.further([], tokens, self._form)
        if len(chunks) * cached.chunk <= len(cached.held):
            return
        self._runtime.make_room(min(longest, len(tokens)))
        while chunks:
            try:
                cached.start_behind(chunks, tokens, self._form, move=False)
            except DamagedPrompt as error:
                del chunks[error.index :]
                del chunks[standing_at(chunks, self._form, cached.chunk) :]
            else:
                if cached.ends_bytes > self._spare:
                    cached.forget_ends()
                return

    def _may_keep_ends(self) -> bool:
        """Of the last chunks only, where the room that was planned for the cache has a place for them."""
        cached = self._cached
        assert cached.form is not None, "it has ends"
        needed = ends_needed(cached.form, cached.chunk)
        cached.ends[:-needed] = [None] * (len(cached.ends) - needed)
        if self._room.counts_tokens:
            return True  # the caller of ``load`` chose the slots: there is no plan to keep to
        taken = cached.ends_bytes
        if taken > self._spare:
            return False
        self._runtime.make_room(self._room.worth(self._room.total - self._spare + taken))
        return True
