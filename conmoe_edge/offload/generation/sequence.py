"""The tokens that one key-value cache stands for, and the forwards that add to it.

How many tokens a forward takes decides the last bits of its sums, so it is a function of the tokens alone: a prompt
goes through in whole chunks, counted from its first token, with the rest behind them; the tokens of an answer go one by
one.
What a cache holds is used again only where it was computed just so (``reusable``). Then an answer is the same in a
conversation of many turns, in a fresh one with the same messages, and after memory ran out on the way. A window that
has moved on and a state stand again at the end of a chunk only where that end was kept (``prefix_chunks.py``).

One ``CachedTokens`` belongs to one conversation; several of them take turns on one model. ``step`` is
the unit of those turns: one forward, of at most ``chunk`` tokens. Where memory runs out the runtime
retreats (half the cache slots) and the conversation is computed again from its first token;
``OutOfMemory`` comes only when nothing is left to give up.

Memory: the cache, and the activations of one chunk. Not for several threads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.compat import Arguments, cache_of
from conmoe_edge.errors import OutOfMemory
from conmoe_edge.offload.generation.prefix_chunks import (
    ChunkEnds,
    Form,
    HeldChunk,
    PromptChunk,
    cache_of_chunks,
    ends_needed,
    ends_of,
    form_of,
    moves,
    put_end,
    rows_of,
)
from conmoe_edge.offload.runtime import Runtime
from conmoe_edge.offload.storage.out_of_memory import is_out_of_memory


class CachedTokens:
    """A key-value cache and the tokens in it."""

    def __init__(
        self,
        model: Any,
        chunk: int,
        retreat: Callable[[], bool] | None = None,
        *,
        empty: Callable[[], Any] = lambda: None,
    ) -> None:
        """Nothing is held yet.

        Args:
            model: with its runtime as ``model.conmoe``.
            chunk: tokens of a prompt that go through the model at a time; the package's.
            retreat: gives memory up and says whether it could; the runtime's own by default.
            empty: makes the cache that the first forward gets; by default the model makes it.
        """
        self.held: list[int] = []
        self.chunk = chunk
        self.whole = 0  # of the held tokens, those that went through in whole chunks
        self.in_chunks = True  # until a cache turns up that wants the prompt in one piece
        self.form: Form | None = None  # known once there is a cache, where that has one
        self.ends: list[ChunkEnds | None] = []  # of the whole chunks, those that are kept
        self.wants_end: Callable[[int], bool] = lambda index: True  # behind which chunks to stand
        self.may_keep_ends: Callable[[], bool] = lambda: False  # asked once one more is there
        self.on_chunk: Callable[[Sequence[int], HeldChunk], None] | None = None
        self._model = model
        self._runtime: Runtime = model.conmoe
        self._retreat = retreat or self._runtime.retreat
        self._empty = empty
        self._cache: Any = None
        accepted = Arguments.of(model)
        self._cache_name = accepted.cache
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted.positional else {}
        self._says_positions = "position_ids" in accepted.positional

    def forget(self) -> None:
        """Drop the cache; the next step starts from the first token."""
        self._cache = None
        self.held = []
        self.whole = 0
        self.ends = []

    @property
    def ends_bytes(self) -> int:
        """Of the ends that are kept, which lie beside the cache."""
        return sum(one.nbytes for one in self.ends if one is not None)

    def forget_ends(self) -> None:
        """Drop the ends; what has moved on stands at none of these places again."""
        self.ends = [None] * len(self.ends)

    def reusable(self, tokens: Sequence[int]) -> int:
        """How many of the held tokens an answer to ``tokens`` may begin with."""
        common = reusable(self.held[: self.whole], tokens, self.chunk)
        if common == len(self.held) or self.form is None or self._can_crop():
            return common
        return next((n for n in range(common, 0, -self.chunk) if self._has_ends(n)), 0)

    def chunk_at(self, index: int) -> HeldChunk:
        """The whole chunk ``index`` as it lies here: views, which are good until the next forward."""
        assert self.form is not None, "asked where there is one"
        kept = self.ends[index] if index < len(self.ends) else None
        place = index * self.chunk
        layers = [
            rows_of(self._cache, i, place, place + self.chunk)
            if one.kind == "rows"
            else (None if kept is None else kept.layers[i])
            for i, one in enumerate(self.form)
        ]
        return HeldChunk(layers, kept is not None or not moves(self.form))

    def start_behind(
        self, chunks: Sequence[PromptChunk], tokens: Sequence[int], form: Form, *, move: bool
    ) -> None:
        """Hold ``chunks``, which are the beginning of ``tokens``; as ``cache_of_chunks``. Nothing is held where it
        raises what a chunk raises.
        """
        self.forget()
        moving = moves(form)
        kept = [
            chunk.ends(form) if moving and isinstance(chunk, HeldChunk) else None
            for chunk in chunks
        ]
        cache = cache_of_chunks(self._model, chunks, form, self.chunk, move=move)
        if moving:
            kept[-1] = ends_of(cache, form, self.chunk)
        self.form, self._cache, self.ends = form, cache, kept
        self.held = list(tokens[: len(chunks) * self.chunk])
        self.whole = len(self.held)

    def give_away(self) -> Any:
        """The cache, which is no longer held here."""
        cache = self._cache
        self.forget()
        return cache

    def rewind(self, tokens: Sequence[int]) -> None:
        """Take the cache back to what an answer to ``tokens`` may begin with."""
        self.keep(self.reusable(tokens))

    def keep(self, count: int) -> None:
        """Take the cache back to its first ``count`` tokens; to none, where it cannot be taken back."""
        surplus = len(self.held) - count
        if surplus <= 0:
            return
        if not count or not self._take_back(count, surplus):
            self.forget()
            return
        self.whole = min(self.whole, count // self.chunk * self.chunk)
        del self.held[count:]
        del self.ends[self.whole // self.chunk :]

    def _take_back(self, count: int, surplus: int) -> bool:
        """Let the cache stand behind ``count`` tokens, ``surplus`` less than it holds; whether it could."""
        if self.form is None:
            if not is_plain(self._cache) or not self._cache.is_croppable:
                return False
            try:
                self._cache.crop(-surplus)
            except (RuntimeError, ValueError):  # a window that has moved on cannot be moved back
                return False
        elif self._can_crop():
            self._cache.crop(-surplus)
        elif self._has_ends(count):
            self._stand_at(count, surplus)
        else:
            return False
        return True

    def _can_crop(self) -> bool:
        """Whether the cache can be taken back to any token: it has no state, and no window that has moved on."""
        if self.form is None or self._cache is None:
            return False
        return all(
            one.kind == "rows"
            or (one.kind == "window" and layer.get_seq_length() < layer.sliding_window)
            for one, layer in zip(self.form, self._cache.layers, strict=True)
        )

    def _has_ends(self, count: int) -> bool:
        """Whether the cache can stand behind ``count`` tokens again, at the end of a chunk."""
        if self.form is None or count % self.chunk or count // self.chunk > len(self.ends):
            return False
        last = count // self.chunk
        needed = self.ends[max(0, last - ends_needed(self.form, self.chunk)) : last]
        return all(one is not None for one in needed)

    def _stand_at(self, count: int, surplus: int) -> None:
        """``keep`` for a cache that has moved on."""
        assert self.form is not None, "it was looked at"
        last = count // self.chunk
        for index, (one, layer) in enumerate(zip(self.form, self._cache.layers, strict=True)):
            if one.kind == "rows":
                layer.crop(-surplus)
                continue
            needed = self.ends[max(0, last - ends_needed((one,), self.chunk)) : last]
            parts = [ends.layers[index] or () for ends in needed if ends is not None]
            put_end(layer, one, parts, count, self._model.dtype)

    def step(self, tokens: Sequence[int], prompt: int) -> Tensor | None:
        """One forward towards ``tokens``, which begin with what is held and go further.

        The first ``prompt`` of them go through in chunks, those behind one by one, also where they have to be computed
        again.

        Returns:
            Scores [1, V] of what follows them once all are in; ``None`` before that.

        Raises:
            OutOfMemory: nothing is left to give up.
        """
        try:
            return self._forward(tokens, prompt)
        except (RuntimeError, MemoryError, OutOfMemory) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error)
        # Out of the handler, so that the error's traceback does not keep the memory that is to be given up.
        self.after_out_of_memory(said)
        return None

    def after_out_of_memory(self, said: str) -> None:
        """Let go of the cache, which may have grown in some layers only, and of slots; the next steps compute the
        conversation again. ``said`` is the text of the error.

        Raises:
            OutOfMemory: nothing is left to give up.
        """
        self.forget()
        if not self._retreat():
            raise OutOfMemory(
                "Memory ran out while the model was computing.",
                f"the cache has its fewest slots, and {self.chunk} tokens at a time are part of the package; what "
                f"failed says: {said.strip().splitlines()[0][:100] if said.strip() else 'no memory'}",
                f"Close other programs; if that does not help, start again with --context "
                f"{max(1, self._runtime.context // 2)}",
            )

    @torch.no_grad()
    def _forward(self, tokens: Sequence[int], prompt: int) -> Tensor | None:
        start = len(self.held)
        end = start + 1  # of an answer
        if start < prompt:
            end = min(prompt, start + self.chunk) if self.in_chunks else prompt
        # Held by this frame alone while it grows: whatever ends the forward early leaves no half-grown
        # cache behind.
        cache, held, whole, ends = self._cache, self.held, self.whole, self.ends
        self.forget()
        cache = self._empty() if cache is None else cache
        out = self._model(**self._call(tokens, start, end, cache))
        grown = cache_of(out)
        if self.in_chunks and end < prompt and not is_plain(grown):
            self.in_chunks = False  # a model with a cache of its own wants the prompt in one piece
            return None
        self._cache, self.held, self.ends = grown, [*held, *tokens[start:end]], ends
        self.whole = whole
        if self.form is None:
            self.form = form_of(self._model, grown)
        if start == whole and end - start == self.chunk and end <= prompt:
            self.whole = end
            self._end_of_chunk()
        return out.logits[:, -1] if end == len(tokens) else None

    def _end_of_chunk(self) -> None:
        """A whole chunk has just come in: what will not be there later is kept, or handed on."""
        if self.form is None:
            return
        index = len(self.ends)
        self.ends.append(None)
        if not moves(self.form):
            if self.on_chunk is not None:
                self.on_chunk(self.held, self.chunk_at(index))
            return
        wanted = self.wants_end(index)
        if not wanted and self.on_chunk is None:
            return
        self.ends[index] = ends_of(self._cache, self.form, self.chunk)
        if self.on_chunk is not None:
            self.on_chunk(self.held, self.chunk_at(index))
        if not wanted or not self.may_keep_ends():
            self.ends[index] = None

    def _call(self, tokens: Sequence[int], start: int, end: int, cache: Any) -> dict[str, Any]:
        """The arguments of the forward of some of the tokens."""
        device = self._model.device
        # Not left to the model: some cache classes of models' own say that they hold nothing (MiniMax).
        places = torch.arange(start, end, device=device)[None]
        return {
            "input_ids": torch.tensor([list(tokens[start:end])], device=device),
            "use_cache": True,
            **({"position_ids": places} if self._says_positions else {}),
            **{self._cache_name: cache},
            **self._last_only,
        }

    def one_call(self, tokens: Sequence[int], prompt: int) -> dict[str, Any] | None:
        """The arguments of the next forward, where that takes the last of ``tokens`` alone, behind a cache that it adds
        to in place; ``None`` where it does not. ``took`` has to follow it.
        """
        start = len(self.held)
        if start + 1 != len(tokens) or start < prompt or not is_plain(self._cache):
            return None
        return self._call(tokens, start, start + 1, self._cache)

    def took(self, token: int) -> None:
        """The forward of ``one_call`` has added ``token`` to the cache."""
        self.held.append(token)


def reusable(held: Sequence[int], tokens: Sequence[int], chunk: int) -> int:
    """Of the tokens ``held``, all computed in whole chunks, those that an answer to ``tokens`` may begin with: the
    whole chunks in common. At least one token is left to compute.
    """
    return common_length(held, tokens[:-1]) // chunk * chunk


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    common = 0
    for ours, theirs in zip(one, other, strict=False):
        if ours != theirs:
            break
        common += 1
    return common


def is_plain(cache: Any) -> bool:
    """True for transformers' general cache. Models with a class of their own keep states beside the
    layers' keys and values, which can neither be taken back nor, in general, be filled in pieces.
    """
    from transformers import DynamicCache

    return type(cache) is DynamicCache
