"""The tokens that one key-value cache stands for, and the forwards that add to it.

How many tokens a forward takes decides the last bits of its sums, so it is a function of the tokens alone: a prompt
goes through in whole chunks, counted from its first token, with the rest behind them; the tokens of an answer go one by
one.
What a cache holds is used again only where it was computed just so (``reusable``). Then an answer is the same in a
conversation of many turns, in a fresh one with the same messages, and after memory ran out on the way.

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
from conmoe_edge.offload.runtime import Runtime
from conmoe_edge.offload.storage.out_of_memory import is_out_of_memory


class CachedTokens:
    """A key-value cache and the tokens in it."""

    def __init__(self, model: Any, chunk: int, retreat: Callable[[], bool] | None = None) -> None:
        """Nothing is held yet.

        Args:
            model: with its runtime as ``model.conmoe``.
            chunk: tokens of a prompt that go through the model at a time; the package's.
            retreat: gives memory up and says whether it could; the runtime's own by default.
        """
        self.held: list[int] = []
        self.chunk = chunk
        self.whole = 0  # of the held tokens, those that went through in whole chunks
        self.in_chunks = True  # until a cache turns up that wants the prompt in one piece
        self._model = model
        self._runtime: Runtime = model.conmoe
        self._retreat = retreat or self._runtime.retreat
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

    def reusable(self, tokens: Sequence[int]) -> int:
        """How many of the held tokens an answer to ``tokens`` may begin with."""
        return reusable(self.held[: self.whole], tokens, self.chunk)

    def rewind(self, tokens: Sequence[int]) -> None:
        """Take the cache back to what an answer to ``tokens`` may begin with."""
        self.keep(self.reusable(tokens))

    def keep(self, count: int) -> None:
        """Take the cache back to its first ``count`` tokens; to none, where it cannot be taken back."""
        surplus = len(self.held) - count
        if surplus <= 0:
            return
        self.whole = min(self.whole, count // self.chunk * self.chunk)
        if count == 0 or not is_plain(self._cache) or not self._cache.is_croppable:
            self.forget()
            return
        try:
            self._cache.crop(-surplus)
        except (RuntimeError, ValueError):  # a window that has moved on cannot be moved back
            self.forget()
            return
        del self.held[count:]

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
        cache, held, whole = self._cache, self.held, self.whole
        self.forget()
        out = self._model(**self._call(tokens, start, end, cache))
        grown = cache_of(out)
        if self.in_chunks and end < prompt and not is_plain(grown):
            self.in_chunks = False  # a model with a cache of its own wants the prompt in one piece
            return None
        self._cache, self.held = grown, [*held, *tokens[start:end]]
        self.whole = end if start == whole and end - start == self.chunk else whole
        return out.logits[:, -1] if end == len(tokens) else None

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
