"""One answer, a forward at a time: what ``ChatSession.reply`` does in one go, in steps that can take
turns with those of other answers.

The prompt goes in by whole chunks from its first token, and each new token alone, whoever else is
being answered: the forwards are those of a conversation that has the model to itself, so the tokens are
the same too. Memory: the cache, as reserved, and one chunk's activations while it runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from conmoe_edge.offload.generation.detokenize import TextStream
from conmoe_edge.offload.generation.sampling import Draw, Sampler
from conmoe_edge.offload.generation.sequence import CachedTokens, common_length
from conmoe_edge.serve.stops import StopFilter

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of the model.

    Attributes:
        tokens: the prompt.
        draw: how tokens are drawn.
        max_tokens: of the answer.
        stops: strings that end it.
    """

    tokens: tuple[int, ...]
    draw: Draw
    max_tokens: int
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer; ``cached`` ones of the prompt did not have to be computed."""

    prompt: int
    completion: int
    cached: int


class Answer:
    """An answer that is being made."""

    def __init__(
        self, ask: Ask, cached: CachedTokens, model: Any, tokenizer: Any, ends: frozenset[int]
    ) -> None:
        """``cached`` holds nothing, or whole chunks of this prompt."""
        self.cached = cached
        self.finish: Finish | None = None
        self.first_token_at: float | None = None
        self._ask = ask
        self._tokens = list(ask.tokens)
        self._reused = len(cached.held)
        self._ends = ends
        self._made = 0
        self._text = TextStream(tokenizer)
        self._stops = StopFilter(ask.stops)
        self._sampler = Sampler(ask.draw, model.device)

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(len(self._ask.tokens), self._made, self._reused)

    @property
    def made(self) -> int:
        """Tokens of the answer so far, the end mark included."""
        return self._made

    def step(self) -> str:
        """One forward: a chunk of the prompt, or the next token. The text that became certain.

        Afterwards ``finish`` says whether, and how, the answer is over.

        Raises:
            OutOfMemory: memory ran out and nothing was left to give up.
        """
        assert self.finish is None, "there is nothing to come"
        logits = self.cached.step(self._tokens)
        if logits is None:
            return ""
        token = self._sampler.next(torch.tensor([self._tokens], device=logits.device), logits)
        self._made += 1
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        if token in self._ends:
            return self._end("stop")
        self._tokens.append(token)
        piece = self._stops.add(self._text.add(token))
        if self._stops.hit:
            self.finish = "stop"
        elif self._made >= self._ask.max_tokens:
            return piece + self._end("length")
        return piece

    def whole_chunks(self, chunk: int) -> int:
        """How much of the cache another prompt may begin with: the prompt's whole chunks. What was
        computed in other portions could differ in the last bit, and an answer must not depend on who
        asked before.
        """
        return min(len(self.cached.held), len(self._ask.tokens) // chunk * chunk)

    def _end(self, finish: Finish) -> str:
        rest = self._stops.add(self._text.finish()) + self._stops.finish()
        self.finish = "stop" if self._stops.hit else finish
        return rest


def reusable(held: Sequence[int], tokens: Sequence[int], chunk: int) -> int:
    """Tokens of a cache that an answer to ``tokens`` may begin with: the whole chunks in common. At
    least one token is left to compute.
    """
    return common_length(held, tokens[:-1]) // chunk * chunk
