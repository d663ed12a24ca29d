"""How the next token is drawn: transformers' own logits processors, in transformers' own order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.errors import CheckpointError
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings

GREEDY_BELOW = 1e-4
"""A temperature that is taken for 0: dividing by less gives infinities."""
ONE_LEFT = 1e-6
"""A ``top_p`` that leaves one token, whatever the probabilities are."""


class Sampler:
    """Draws the tokens of one answer; the same seed gives the same answer."""

    def __init__(self, settings: SamplingSettings, device: torch.device) -> None:
        """``settings`` are filled."""
        temperature, top_p = settings.temperature, settings.top_p
        assert temperature is not None and top_p is not None, "the settings were filled"
        # Where one token may be drawn it is the first of the likeliest; the library's filters keep
        # all equals.
        self._greedy = temperature < GREEDY_BELOW or settings.top_k == 1 or top_p <= ONE_LEFT
        self._processors = _processors(settings, drawn=not self._greedy)
        self._generator = torch.Generator(device=device)
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    def next(self, tokens: Sequence[int], logits: Tensor) -> int:
        """One token after ``tokens`` with the scores ``logits`` [1, V]; waits until a GPU is done. Where it fails, the
        next call draws as this one would have.

        Raises:
            CheckpointError: the scores are no numbers, so that no token is more likely than another.
        """
        scores = logits.float()
        if not bool(scores.max().isfinite()):
            raise _no_number()
        if self._processors:
            before = torch.tensor([tokens], device=logits.device)
            scores = self._processors(before, scores)  # type: ignore[arg-type]
        if self._greedy:
            return int(scores.argmax(-1))
        chances = torch.softmax(scores, dim=-1)
        if not bool(chances.sum().isfinite()):
            raise _no_number()
        before = self._generator.get_state()
        try:
            return int(torch.multinomial(chances, 1, generator=self._generator))
        except RuntimeError:
            self._generator.set_state(before)
            raise


def _no_number() -> CheckpointError:
    return CheckpointError(
        "The model computes NaN or infinity.",
        "its weights, or the numbers in its config.json, are damaged",
        "Make the package again with conmoe-edge fit, or copy it again from where it came from.",
    )


def _processors(settings: SamplingSettings, *, drawn: bool) -> Any:
    """What changes the scores: penalties always, filters where a token is ``drawn``."""
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    found = LogitsProcessorList()
    if settings.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if drawn:
        found.append(TemperatureLogitsWarper(float(settings.temperature or 0.0)))
        if settings.top_k:
            found.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1.0:
            found.append(TopPLogitsWarper(settings.top_p))
    return found
