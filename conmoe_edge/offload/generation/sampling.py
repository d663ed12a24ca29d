"""How the next token is drawn: transformers' own logits processors, in transformers' own order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draw:
    """Settings of one answer. ``temperature == 0`` is greedy."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def of(
        cls,
        generation_config: Any,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
    ) -> Draw:
        """The model's own generation config, with what the caller gave instead."""
        own = generation_config
        usual = (own.temperature or 1.0) if own.do_sample else 0.0
        return cls(
            temperature=usual if temperature is None else temperature,
            top_p=top_p if top_p is not None else own.top_p or 1.0,
            top_k=own.top_k or 0,
            repetition_penalty=own.repetition_penalty or 1.0,
            seed=seed,
        )


ONE_LEFT = 1e-6
"""A ``top_p`` that leaves one token, whatever the chances are."""


class Sampler:
    """Draws tokens for one answer; the same seed gives the same answer."""

    def __init__(self, draw: Draw, device: torch.device) -> None:
        from transformers.generation.logits_process import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._processors = LogitsProcessorList()
        # Where one token may be drawn it is the first of the likeliest; the library's filters keep all equals.
        self._greedy = draw.temperature == 0 or draw.top_k == 1 or draw.top_p <= ONE_LEFT
        if draw.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(draw.repetition_penalty))
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(float(draw.temperature)))
            if draw.top_k:
                self._processors.append(TopKLogitsWarper(draw.top_k))
            if draw.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(draw.top_p))
        self._generator = torch.Generator(device=device)
        if draw.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(draw.seed)

    def next(self, tokens: Tensor, logits: Tensor) -> int:
        """One token after ``tokens`` [1, T] with the scores ``logits`` [1, V]."""
        scores = self._processors(tokens, logits.float())  # type: ignore[arg-type]
        if self._greedy:
            return int(scores.argmax(-1))
        chances = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(chances, 1, generator=self._generator))
