"""Chat on top of a loaded package: messages in, text as it comes, and an account of the turn.

The session keeps the key-value cache between turns and feeds only what is new; where a model's
cache cannot be taken back to the common beginning, it starts over. Prompts go in by chunks of the
runtime's ``prefill_chunk`` tokens. A context that is full raises ``ContextFull`` before anything is
cut; where memory runs out the runtime retreats (half the cache slots, then shorter chunks) and the
turn goes on; ``OutOfMemory`` comes only when nothing is left to give up.

Memory: the cache, as planned for ``context`` tokens, and the activations of one chunk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.context_limit import context_full, longest_context
from conmoe_edge.offload.generation.detokenize import TextStream
from conmoe_edge.offload.generation.prompt import end_tokens, prompt_tokens
from conmoe_edge.offload.generation.sampling import Draw, Sampler
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.runtime import Runtime

LONGEST_ANSWER = 1024
"""Tokens of an answer where neither the caller nor the model's generation config says."""

Finish = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True, slots=True)
class TurnStats:
    """What one answer took.

    Attributes:
        tokens: of the answer, the end mark included.
        prompt_tokens: that were new to the model and had to be computed.
        seconds_to_first: from the question to the first token.
        tokens_per_second: after the first token; 0 for answers of one token.
        hits, misses, bytes_read: of the prototypes, during this turn.
        context_used: tokens that the conversation takes now.
        finish: the model was done (``stop``), ``max_tokens`` came (``length``), the context is full
            (``context``), or the caller asked to stop (``interrupted``).
        waited_seconds: that computing stood still for prototypes on their way.
    """

    tokens: int
    prompt_tokens: int
    seconds_to_first: float
    tokens_per_second: float
    hits: int
    misses: int
    bytes_read: int
    context_used: int
    finish: Finish
    waited_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the requests that found their prototype resident."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


class ChatSession:
    """A conversation with one model. Not for several threads at once."""

    def __init__(self, model: Any, tokenizer: Any, context: int | None = None) -> None:
        """``context`` may be shorter than what the model was loaded for, not longer."""
        self.model = model
        self.tokenizer = tokenizer
        self.runtime: Runtime = model.conmoe
        if context is not None and context > self.runtime.context:
            raise UsageError(
                f"The model was loaded for {self.runtime.context} tokens, not for {context}.",
                "the memory is divided when it is loaded",
                f"Load it with --context {context}",
            )
        self.context = context or self.runtime.context
        self.last: TurnStats | None = None
        self._cached = CachedTokens(model, max(1, min(self.runtime.prefill_chunk, self.context)))

    @property
    def context_used(self) -> int:
        """Tokens that the cache holds."""
        return len(self._cached.held)

    def forget(self) -> None:
        """Drop the cache; the next turn starts from its first token."""
        self._cached.forget()

    def reply(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_event: threading.Event | None = None,
    ) -> Iterator[str]:
        """The answer to ``messages``, piece by piece; afterwards ``last`` has the turn's account.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first.
            max_tokens: of the answer.
            temperature, top_p: 0 is greedy; the model's generation config by default.
            seed: the same seed gives the same answer.
            stop_event: once it is set, the answer ends within a token (or a chunk of the prompt).

        Raises:
            ContextFull: the messages leave no room for an answer, or the answer filled the context;
            its text has been
                given out by then.
            OutOfMemory: memory ran out and nothing was left to give up.
        """
        stop = stop_event or threading.Event()
        tokens = prompt_tokens(self.tokenizer, messages)
        if len(tokens) + 1 > self.context:
            raise context_full(len(tokens) + 1, self.context, longest_context(self.model))
        own = self.model.generation_config
        limit = max_tokens or own.max_new_tokens or LONGEST_ANSWER
        sampler = Sampler(Draw.of(own, temperature, top_p, seed), self.model.device)
        ends = end_tokens(self.model, self.tokenizer)
        text = TextStream(self.tokenizer)
        account = _Account(self.runtime)
        account.prompt_tokens = len(tokens) - self._cached.rewind(tokens)
        finish: Finish = "length"
        try:
            for _ in range(limit):
                if len(tokens) > self.context:
                    finish = "context"
                    break
                logits = self._advance(tokens, stop)
                if logits is None:
                    finish = "interrupted"
                    break
                token = sampler.next(torch.tensor([tokens], device=logits.device), logits)
                account.count()
                if token in ends:
                    finish = "stop"
                    break
                tokens.append(token)
                piece = text.add(token)
                if piece:
                    yield piece
            rest = text.finish()
            if rest:
                yield rest
        except GeneratorExit:
            finish = "interrupted"
            raise
        finally:
            self.last = account.close(len(tokens), finish)
        if finish == "context":
            raise context_full(len(tokens), self.context, longest_context(self.model))

    def scores(self, tokens: Sequence[int]) -> Tensor:
        """Scores [1, V] of what follows ``tokens``, at least one; only what the cache does not
        stand for yet is computed.

        Raises:
            ContextFull: they are more than the context.
            OutOfMemory: memory ran out and nothing was left to give up.
        """
        if len(tokens) > self.context:
            raise context_full(len(tokens), self.context, longest_context(self.model))
        self._cached.rewind(tokens)
        logits = self._advance(tokens, threading.Event())
        assert logits is not None, "nobody asked to stop"
        return logits

    def _advance(self, tokens: Sequence[int], stop: threading.Event) -> Tensor | None:
        """Scores [1, V] of what follows ``tokens``; ``None`` where the caller asked to stop."""
        while not stop.is_set():
            logits = self._cached.step(tokens)
            if logits is not None:
                return logits
        return None


class _Account:
    """Counts one turn."""

    def __init__(self, runtime: Runtime) -> None:
        self.prompt_tokens = 0
        self._runtime = runtime
        self._before = runtime.stats()
        self._start = time.perf_counter()
        self._first = self._latest = 0.0
        self._tokens = 0

    def count(self) -> None:
        self._latest = time.perf_counter()
        self._tokens += 1
        if self._tokens == 1:
            self._first = self._latest

    def close(self, context_used: int, finish: Finish) -> TurnStats:
        now, before = self._runtime.stats(), self._before
        after_first = self._latest - self._first
        return TurnStats(
            tokens=self._tokens,
            prompt_tokens=self.prompt_tokens,
            seconds_to_first=self._first - self._start if self._tokens else 0.0,
            tokens_per_second=(self._tokens - 1) / after_first
            if self._tokens > 1 and after_first > 0
            else 0.0,
            hits=now.hits - before.hits,
            misses=now.misses - before.misses,
            bytes_read=now.bytes_read - before.bytes_read,
            context_used=context_used,
            finish=finish,
            waited_seconds=now.waited_seconds - before.waited_seconds,
        )
