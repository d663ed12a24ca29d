"""Chat on top of a loaded package: messages in, text as it comes, and the figures of the turn.

The session keeps the key-value cache between turns and uses the whole chunks of the prompt again that the next
one begins with, so that an answer is that of a fresh conversation with the same messages; where a model's
cache cannot be taken back to them, it starts over. With ``files`` a conversation also begins with what an earlier
process has computed. Memory: the cache, as planned for
``context`` tokens, and the activations of one chunk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from conmoe_edge.errors import InUse, UsageError
from conmoe_edge.offload.generation.answer import Answer, Finish, Generation
from conmoe_edge.offload.generation.answer_parts import Part, Said, Thought
from conmoe_edge.offload.generation.chat_prompt import chat_prompt
from conmoe_edge.offload.generation.context_limit import context_full, longest_context
from conmoe_edge.offload.generation.grammar import Grammar, GrammarMaker
from conmoe_edge.offload.generation.known_prompt import KnownPrompt
from conmoe_edge.offload.generation.prompt import end_tokens, prompt_tokens
from conmoe_edge.offload.generation.prompt_files import PromptFiles
from conmoe_edge.offload.generation.sampling_settings import GREEDY, SamplingSettings
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.generation.tool_forms import Tools
from conmoe_edge.offload.runtime import Runtime, RuntimeStats


@dataclass(frozen=True, slots=True)
class TurnStats:
    """What one answer took.

    Attributes:
        tokens: of the answer, the end mark included.
        prompt_tokens: of the prompt, those that had to be computed.
        known_tokens: of the prompt, those that were there from an earlier one.
        seconds_to_first: from the question to the first token.
        tokens_per_second: after the first token; 0 for answers of one token.
        hits, misses, bytes_read: of the prototypes, during this turn.
        context_used: tokens that the conversation takes now.
        finish: how the answer ended.
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
    known_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the requests that found their prototype resident."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


class ChatSession:
    """A conversation with one model. Several conversations may share a model, in threads of their own; they take turns.
    One conversation gives one answer at a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        context: int | None = None,
        *,
        allow_special_tokens: bool = False,
        files: PromptFiles | None = None,
    ) -> None:
        """``context`` may be shorter than what the model was loaded for, not longer. ``allow_special_tokens``: whether
        control tokens that are spelt out in messages steer the model. ``files``: where prompts are kept over restarts.

        ``on_reasoning`` may be set: it gets the reasoning of an answer as it comes, and ``None`` when that is over.
        """
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
        self.on_reasoning: Callable[[str | None], None] = lambda _: None
        self.allow_special_tokens = allow_special_tokens
        self._grammars: GrammarMaker | None = None
        self._cached = CachedTokens(model, max(1, min(self.runtime.prefill_chunk, self.context)))
        self._known = KnownPrompt(model, self._cached, files)
        self._answering = threading.Lock()

    @property
    def context_used(self) -> int:
        """Tokens that the cache holds."""
        return len(self._cached.held)

    def count(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Tokens of the prompt that ``messages`` make.

        Raises:
            UsageError, PackageError: as ``prompt_tokens``.
        """
        allowed = self.allow_special_tokens
        return len(prompt_tokens(self.tokenizer, messages, allow_special_tokens=allowed))

    def forget(self) -> None:
        """Drop the cache; the next turn starts from its first token."""
        self._cached.forget()

    def json_grammar(self, schema: Mapping[str, Any] | bool) -> Grammar:
        """What holds an answer to a JSON schema, as ``SamplingSettings(grammar=...)``.

        Raises:
            UsageError: the schema is wrong, or uses what cannot be enforced.
        """
        if self._grammars is None:
            self._grammars = GrammarMaker.of_model(self.model, self.tokenizer)
        return self._grammars.json_schema(schema)

    def reply(
        self,
        messages: Sequence[Mapping[str, Any]],
        settings: SamplingSettings | None = None,
        *,
        stop_event: threading.Event | None = None,
    ) -> Iterator[str]:
        """The text of the answer to ``messages``, piece by piece, as ``parts``. A model's reasoning is no part of it;
        ``on_reasoning`` gets that.
        """
        thinks = False
        with closing(self.parts(messages, settings, stop_event=stop_event)) as parts:
            for part in parts:
                if isinstance(part, Thought):
                    thinks = True
                    self.on_reasoning(part.text)
                elif isinstance(part, Said):
                    if thinks:
                        self.on_reasoning(None)
                    thinks = False
                    yield part.text
        if thinks:
            self.on_reasoning(None)

    def parts(
        self,
        messages: Sequence[Mapping[str, Any]],
        settings: SamplingSettings | None = None,
        *,
        tools: Tools = (),
        template_kwargs: Mapping[str, Any] | None = None,
        stop_event: threading.Event | None = None,
    ) -> Generator[Part, None, None]:
        """What is reasoned, said and called in the answer to ``messages``, piece by piece; afterwards ``last`` has the
        turn's figures.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first; answers may have ``tool_calls``, and what came
                of those is of role ``tool``.
            settings: by default the model's generation config.
            tools: that the answer may call: ``{"type": "function", "function": {...}}``.
            template_kwargs: further variables of the chat template, such as ``enable_thinking``.
            stop_event: once it is set, the answer ends within a token (or a chunk of the prompt).

        Raises:
            UsageError, PackageError: as ``prompt_tokens``.
            InUse: this conversation is giving another answer, which is neither over nor closed.
            ContextFull: the messages leave no room for an answer, or the answer filled the context;
                its text has been given out by then.
            OutOfMemory: memory ran out and nothing was left to give up.
        """
        if not self._answering.acquire(blocking=False):
            raise InUse(
                "This conversation is giving another answer.",
                "its key-value cache holds one sequence of tokens",
                "read that answer to its end or close() it; a ChatSession of its own for every conversation",
            )
        try:
            stop = stop_event or threading.Event()
            yield from self._parts(messages, settings, tools, template_kwargs, stop)
        finally:
            self._answering.release()

    def _parts(
        self,
        messages: Sequence[Mapping[str, Any]],
        settings: SamplingSettings | None,
        tools: Tools,
        template_kwargs: Mapping[str, Any] | None,
        stop: threading.Event,
    ) -> Iterator[Part]:
        prompt = chat_prompt(
            self.tokenizer,
            messages,
            tools=tools,
            template_kwargs=template_kwargs,
            allow_special_tokens=self.allow_special_tokens,
            stop_event=stop,
        )
        tokens, form = prompt.tokens, prompt.form
        if len(tokens) + 1 > self.context:
            raise context_full(len(tokens) + 1, self.context, longest_context(self.model))
        before, start = self.runtime.stats(), time.perf_counter()
        settings = (settings or SamplingSettings()).filled(self.model.generation_config)
        self._known.begin(tokens, len(tokens) + (settings.max_tokens or 0))
        answer = Answer(
            self.model,
            self.tokenizer,
            self._cached,
            tokens,
            form.settings(settings),
            context=self.context,
            ends=end_tokens(self.model, self.tokenizer),
        )
        reader = form.reader(tools)
        try:
            while answer.finish is None:
                piece = answer.interrupt() if stop.is_set() else answer.step()
                yield from reader.add(piece)
            yield from reader.finish()
        finally:  # also where the caller leaves the stream, or memory ran out
            self.last = _turn_stats(answer, start, before, self.runtime.stats())
        if answer.finish == "context":
            raise context_full(len(answer.tokens), self.context, longest_context(self.model))

    def greedy(self, tokens: Sequence[int], count: int) -> Generation:
        """``count`` greedy tokens after ``tokens``, without their text; no token ends them."""
        self._known.begin(tokens, len(tokens) + count)
        settings = replace(GREEDY, max_tokens=count)
        return Generation(
            self.model, self._cached, tokens, settings, context=self.context, ends=frozenset()
        )


def _turn_stats(
    answer: Generation, start: float, before: RuntimeStats, now: RuntimeStats
) -> TurnStats:
    first, latest = answer.first_at or start, answer.latest_at or start
    after_first = latest - first
    return TurnStats(
        tokens=answer.made,
        prompt_tokens=answer.prompt_length - answer.reused,
        seconds_to_first=first - start,
        tokens_per_second=(answer.made - 1) / after_first if after_first > 0 else 0.0,
        hits=now.hits - before.hits,
        misses=now.misses - before.misses,
        bytes_read=now.bytes_read - before.bytes_read,
        context_used=len(answer.tokens),
        finish=answer.finish or "interrupted",
        waited_seconds=now.waited_seconds - before.waited_seconds,
        known_tokens=answer.reused,
    )
