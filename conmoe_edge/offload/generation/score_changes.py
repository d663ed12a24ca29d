"""What a caller's wishes do to the scores of the next token before one is drawn: a bias for single tokens, and
penalties for those that the answer has already.

The penalties are those of OpenAI's API: with c the times that the answer (not the prompt) has a token, its score loses
``frequency_penalty`` * c, and ``presence_penalty`` where c > 0. transformers has processors for the other changes.
Memory: a number for each different token of the answer.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from conmoe_edge.offload.generation.sampling_settings import SamplingSettings


class ScoreChanges:
    """The bias and the penalties of one answer."""

    def __init__(self, settings: SamplingSettings) -> None:
        self._bias = dict(settings.logit_bias)
        self._frequency = settings.frequency_penalty
        self._presence = settings.presence_penalty
        self._times: Counter[int] = Counter()
        self._counts = bool(self._frequency or self._presence)
        self.any = bool(self._bias) or self._counts

    def took(self, token: int) -> None:
        """The answer has ``token`` once more."""
        if self._counts:
            self._times[token] += 1

    def changed(self, scores: Tensor) -> Tensor:
        """``scores`` [1, V] with both; the ones given stay as they are."""
        changes = dict(self._bias)
        for token, times in self._times.items():
            lost = self._frequency * times + self._presence
            changes[token] = changes.get(token, 0.0) - lost
        if not changes:
            return scores
        places = torch.tensor(list(changes), device=scores.device)
        values = torch.tensor(list(changes.values()), dtype=scores.dtype, device=scores.device)
        return scores.index_add(1, places, values[None])
