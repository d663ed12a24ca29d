"""Chat on top of a loaded package: messages in, text as it comes, and an account of the turn.

The session keeps the key-value cache between turns and feeds only what is new; where a model's
cache cannot be taken back to the common beginning, it starts over. Prompts go in by chunks of the
runtime's ``prefill_chunk`` tokens. A context that is full raises ``ContextFull`` before anything is
cut; where memory runs out the runtime retreats (half the cache slots, then shorter chunks) and the
turn goes on; ``OutOfMemory`` comes only when nothing is left to give up.

Memory: the cache, as planned for ``context`` tokens, and the activations of one chunk.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from conmoe_edge.errors import OutOfMemory, UsageError
from conmoe_edge.offload.context import context_full, longest_context
from conmoe_edge.offload.runtime import Runtime
from conmoe_edge.offload.sampling import Draw, Sampler
from conmoe_edge.offload.text import TextStream

SHORTEST_CHUNK = 16
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
        self._cache: Any = None
        self._held: list[int] = []  # the tokens that the cache stands for
        self._chunk = max(1, min(self.runtime.prefill_chunk, self.context))
        self._in_chunks = True
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @property
    def context_used(self) -> int:
        """Tokens that the cache holds."""
        return len(self._held)

    def forget(self) -> None:
        """Drop the cache; the next turn starts from its first token."""
        self._cache = None
        self._held = []

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
        tokens = self._tokens_of(messages)
        if len(tokens) + 1 > self.context:
            raise context_full(len(tokens) + 1, self.context, longest_context(self.model))
        own = self.model.generation_config
        limit = max_tokens or own.max_new_tokens or LONGEST_ANSWER
        sampler = Sampler(Draw.of(own, temperature, top_p, seed), self.model.device)
        ends = self._end_tokens()
        text = TextStream(self.tokenizer)
        account = _Account(self.runtime)
        account.prompt_tokens = len(tokens) - self._rewind(tokens)
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
        self._rewind(tokens)
        logits = self._advance(tokens, threading.Event())
        assert logits is not None, "nobody asked to stop"
        return logits

    def _tokens_of(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt: the chat template's, or the last message alone for a model without one."""
        if not messages:
            raise UsageError("There is no message to answer.")
        if not getattr(self.tokenizer, "chat_template", None):
            return list(self.tokenizer(messages[-1]["content"]).input_ids)
        from jinja2 import TemplateError

        try:
            encoded = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                return_dict=True,
            )
        except TemplateError as error:
            raise UsageError(
                "The model's chat template refuses these messages.", str(error)[:200]
            ) from error
        return list(encoded["input_ids"])

    def _end_tokens(self) -> frozenset[int]:
        ends = self.model.generation_config.eos_token_id
        found = set(ends) if isinstance(ends, (list, tuple)) else {ends}
        found.add(self.tokenizer.eos_token_id)
        return frozenset(token for token in found if token is not None)

    def _rewind(self, tokens: Sequence[int]) -> int:
        """Take the cache back to what it has in common with ``tokens``; how many tokens that
        are.
        """
        common = 0
        for ours, theirs in zip(
            self._held, tokens[:-1], strict=False
        ):  # one token at least has to be computed
            if ours != theirs:
                break
            common += 1
        surplus = len(self._held) - common
        if surplus == 0:
            return common
        if common == 0 or not _is_plain(self._cache) or not self._cache.is_croppable:
            self.forget()
            return 0
        try:
            self._cache.crop(-surplus)
        except (RuntimeError, ValueError):  # a window that has moved on cannot be moved back
            self.forget()
            return 0
        del self._held[common:]
        return common

    def _advance(self, tokens: Sequence[int], stop: threading.Event) -> Tensor | None:
        """Scores [1, V] of what follows ``tokens``; ``None`` where the caller asked to stop.

        Where memory runs out, everything is computed again with less: the cache may have grown in
        some layers only.
        """
        while True:
            try:
                return self._feed(tokens, stop)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Out of the handler, so that the error's traceback does not keep the memory that is to
            # be given up.
            self.forget()
            if self.runtime.retreat():
                continue
            if self._chunk <= SHORTEST_CHUNK or not self._in_chunks:
                raise OutOfMemory(
                    "Memory ran out while the model was computing.",
                    f"one cache slot and {self._chunk} tokens at a time are the least there is",
                    f"Close other programs, or load with less --context: {self.runtime.context}",
                )
            self._chunk = max(SHORTEST_CHUNK, self._chunk // 2)

    @torch.no_grad()
    def _feed(self, tokens: Sequence[int], stop: threading.Event) -> Tensor | None:
        logits: Tensor | None = None
        while len(self._held) < len(tokens):
            if stop.is_set():
                return None
            start = len(self._held)
            end = min(len(tokens), start + self._chunk) if self._in_chunks else len(tokens)
            # Held by this frame alone while it grows: whatever ends the forward early leaves no
            # half-grown cache behind.
            cache, held = self._cache, self._held
            self.forget()
            out = self.model(
                input_ids=torch.tensor([list(tokens[start:end])], device=self.model.device),
                past_key_values=cache,
                use_cache=True,
                **self._last_only,
            )
            if self._in_chunks and end < len(tokens) and not _is_plain(out.past_key_values):
                self._in_chunks = (
                    False  # a model with a cache of its own wants the prompt in one piece
                )
                continue
            self._cache, self._held = out.past_key_values, [*held, *tokens[start:end]]
            logits = out.logits[:, -1]
        return logits


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


def _is_plain(cache: Any) -> bool:
    """True for transformers' general cache. Models with a class of their own keep states beside the
    layers' keys and values, which can neither be taken back nor, in general, be filled in pieces.
    """
    from transformers import DynamicCache

    return type(cache) is DynamicCache


def is_out_of_memory(error: BaseException) -> bool:
    """True for every way in which torch and Python say that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text
    )
