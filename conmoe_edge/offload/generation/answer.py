"""The one loop that generates: a forward a step, so that several answers can take turns, or share steps
(``shared_steps.py``).

``Generation`` makes tokens, ``Answer`` their text as well. Chat steps one to its end, serve several
in turns, bench one without text. The prompt goes through the model in the package's chunks and each new token
alone, so the tokens do not depend on the turns. Memory: the cache, and one chunk's activations.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from conmoe_edge.errors import CheckpointError
from conmoe_edge.offload.generation.context_limit import context_full, longest_context
from conmoe_edge.offload.generation.detokenize import TextStream
from conmoe_edge.offload.generation.sampling import Sampler
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.generation.stop_strings import StopFilter
from conmoe_edge.offload.generation.token_scores import TokenScore
from conmoe_edge.offload.storage.out_of_memory import is_out_of_memory

Finish = Literal["stop", "length", "context", "interrupted"]
"""The model was done or a stop string came, ``max_tokens`` came, the context is full, or the caller
asked to stop.
"""


class Generation:
    """The tokens that follow a prompt.

    Attributes:
        tokens: the prompt and what was made, without an end mark.
        prompt_length: tokens of the prompt; ``reused`` of them were in the cache at the start.
        made: tokens made, the end mark included.
        finish: ``None`` while it goes on.
        scores: log-probabilities of tokens that were made, where the settings want them; whoever reads them takes them.
        first_at, latest_at: when the first and the latest token came (``time.perf_counter``).
    """

    def __init__(
        self,
        model: Any,
        cached: CachedTokens,
        tokens: Sequence[int],
        settings: SamplingSettings,
        *,
        context: int,
        ends: frozenset[int],
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: what ``load`` gives.
            cached: holds nothing, or a beginning of ``tokens`` that ``CachedTokens.reusable`` allows.
            tokens: the prompt.
            settings: filled here with the model's generation config.
            context: most tokens of prompt and answer; the last token of an answer is never read
                again and may be one more.
            ends: tokens that end it.

        Raises:
            ContextFull: the prompt is longer than the context.
            CheckpointError: it has tokens that the model does not know.
        """
        if len(tokens) > context:
            raise context_full(len(tokens), context, longest_context(model))
        _check_tokens(tokens, model)
        settings = settings.filled(model.generation_config)
        self.cached = cached
        self.tokens = list(tokens)
        self.prompt_length = len(tokens)
        self.reused = len(cached.held)
        self.made = 0
        self.finish: Finish | None = None
        self.first_at: float | None = None
        self.latest_at: float | None = None
        self._settings = settings
        self._context = context
        self._ends = ends
        self._sampler = Sampler(settings)
        self.scores: list[TokenScore] = []

    @property
    def thought(self) -> int:
        """Tokens of reasoning among those that were made, where the settings say what begins and ends it."""
        return self._sampler.thought

    def advance(self) -> int | None:
        """One forward: the next token, or ``None`` after a chunk of the prompt, or where memory ran out and something
        was given up for it. Not once ``finish`` is set.

        Raises:
            OutOfMemory: memory ran out and nothing was left to give up.
        """
        assert self.finish is None, "there is nothing to come"
        logits = self.cached.step(self.tokens, self.prompt_length)
        return None if logits is None else self.draw(logits)

    def draw(self, logits: Tensor) -> int | None:
        """The next token, of the scores [1, V] of what follows; ``None`` as of ``advance``.

        Raises:
            OutOfMemory: as of ``advance``.
        """
        token, said = None, ""
        try:
            token = self._sampler.next(self.tokens, logits)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error)
        if token is None:
            self.cached.after_out_of_memory(said)
            return None
        self.latest_at = time.perf_counter()
        self.first_at = self.first_at or self.latest_at
        self.made += 1
        if token in self._ends:
            self.finish = "stop"
            return token
        self.tokens.append(token)
        if self._sampler.latest is not None:
            self.scores.append(self._sampler.latest)
        if self.made == self._settings.max_tokens:
            self.finish = "length"
        elif len(self.tokens) > self._context:
            self.finish = "context"
        return token


def _check_tokens(tokens: Sequence[int], model: Any) -> None:
    """Every token has a row in the embedding; a lookup of another one reads somewhere else, or ends the process.

    Raises:
        CheckpointError: one has none.
    """
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    if tokens and rows is not None and not 0 <= min(tokens) <= max(tokens) < rows:
        raise CheckpointError(
            "The tokenizer does not belong to the model.",
            f"the prompt has tokens from {min(tokens)} to {max(tokens)}, and the model knows {rows} of them",
            "put the tokenizer that came with the model into the folder",
        )


class Answer(Generation):
    """A generation with its text; stop strings end it."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        cached: CachedTokens,
        tokens: Sequence[int],
        settings: SamplingSettings,
        *,
        context: int,
        ends: frozenset[int],
    ) -> None:
        """As for ``Generation``."""
        super().__init__(model, cached, tokens, settings, context=context, ends=ends)
        self._text = TextStream(tokenizer, settings.shown)
        self._stops = StopFilter(settings.stop)

    @property
    def met_stop(self) -> str | None:
        """The stop string that ended it; ``None`` where none did."""
        return self._stops.met

    def step(self) -> str:
        """One forward, as ``advance``; the text that became certain."""
        return self.said(self.advance())

    def said(self, token: int | None) -> str:
        """The text that became certain with the token that ``advance`` or ``draw`` gave."""
        if token is None:
            return ""
        piece = "" if token in self._ends else self._stops.add(self._text.add(token))
        if self._stops.hit:
            self.finish = "stop"
        elif self.finish is not None:
            piece += self._rest()
        return piece

    def interrupt(self) -> str:
        """End it here; the text that was held back."""
        rest = self._rest()
        self.finish = "interrupted"
        return rest

    def _rest(self) -> str:
        rest = self._stops.add(self._text.finish()) + self._stops.finish()
        if self._stops.hit:
            self.finish = "stop"
        return rest
