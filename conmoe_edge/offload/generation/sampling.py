"""How the next token is drawn: with what transformers' logits processors leave, in transformers' order.

Penalties, bias and grammars change scores where they are; the draw is on the processor (``likely_tokens.py``), so that
a seed gives the same answer on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.errors import CheckpointError
from conmoe_edge.offload.generation.likely_tokens import likely
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.score_changes import ScoreChanges
from conmoe_edge.offload.generation.thinking import Thinking
from conmoe_edge.offload.generation.token_scores import TokenScore, token_score

GREEDY_BELOW = 1e-4
"""A temperature that is taken for 0: dividing by less gives infinities."""
ONE_LEFT = 1e-6
"""A ``top_p`` that leaves one token, whatever the probabilities are."""


class Sampler:
    """Draws the tokens of one answer; the same seed gives the same answer."""

    def __init__(self, settings: SamplingSettings) -> None:
        """``settings`` are filled."""
        temperature, top_p = settings.temperature, settings.top_p
        assert temperature is not None and top_p is not None, "the settings were filled"
        # Where one token may be drawn it is the first of the likeliest; ``top_k`` keeps all equals.
        self._greedy = temperature < GREEDY_BELOW or settings.top_k == 1 or top_p <= ONE_LEFT
        self._repetition = _repetition(settings)
        self._settings = settings
        self._changes = ScoreChanges(settings)
        self._logprobs = settings.logprobs
        self._rule = None if settings.grammar is None else settings.grammar.rule()
        self._thinking = None if settings.thinking is None else Thinking(settings.thinking)
        self.latest: TokenScore | None = None
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    @property
    def thought(self) -> int:
        """Tokens of reasoning among those that were made."""
        return 0 if self._thinking is None else self._thinking.made

    def next(self, tokens: Sequence[int], logits: Tensor) -> int:
        """One token after ``tokens`` with the scores ``logits`` [1, V]; waits until a GPU is done. Where it fails, the
        next call draws as this one would have. ``latest`` has its log-probability, where that is wanted.

        Raises:
            CheckpointError: the scores are no numbers, so that no token is more likely than another.
        """
        own = logits.float()
        if not math.isfinite(float(own.max())):
            raise _no_number()
        scores = self._changed(tokens, own)
        forced = None if self._thinking is None else self._thinking.forced()
        token = self._draw(scores) if forced is None else forced
        self.latest = None if self._logprobs is None else token_score(own, token, self._logprobs)
        self._changes.took(token)
        reasoned = self._thinks
        if self._thinking is not None:
            self._thinking.took(token)
        if self._rule is not None and not (reasoned or self._thinks):
            self._rule.took(token)
        return token

    @property
    def _thinks(self) -> bool:
        return self._thinking is not None and self._thinking.is_open

    def _changed(self, tokens: Sequence[int], scores: Tensor) -> Tensor:
        """With penalties and bias, and without the tokens that the grammar does not have here."""
        if self._changes.any:
            scores = self._changes.changed(scores)
        if self._repetition is not None:
            scores = self._repetition(_before(tokens, scores), scores)
        if self._rule is None:
            return scores
        if self._thinks:
            scores = self._rule.unended(scores)
        else:
            begin = None if self._thinking is None else self._thinking.may_begin
            scores = self._rule.allowed(scores, begin)
        return scores

    def _draw(self, scores: Tensor) -> int:
        wide = scores[0].cpu().numpy()
        if self._greedy:
            return int(wide.argmax())  # the first of equals; torch's takes ten times as long
        found = likely(wide, self._settings)
        if found is None:
            raise _no_number()
        share = torch.rand((), dtype=torch.float64, generator=self._generator)
        return found.at(float(share))


def _before(tokens: Sequence[int], scores: Tensor) -> Tensor:
    """``tokens`` as transformers' processors take them."""
    return torch.tensor([tokens], device=scores.device)


def _no_number() -> CheckpointError:
    return CheckpointError(
        "The model computes NaN or infinity.",
        "its weights, or the numbers in its config.json, are damaged",
        "Make the package again with conmoe-edge fit, or copy it again from where it came from.",
    )


def _repetition(settings: SamplingSettings) -> Any:
    """The penalty for tokens of prompt and answer; ``None`` where there is none."""
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    if settings.repetition_penalty in (None, 1.0):
        return None
    return RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty))
