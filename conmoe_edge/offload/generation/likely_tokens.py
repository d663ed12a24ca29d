"""The tokens that may be drawn after a temperature and filters, with their chances.

A step has the scores of a whole vocabulary, of which filters leave some. transformers' logits processors sort and
normalise all of them several times, which takes as long as several layers. Here one pass finds those that can be left,
and only they are sorted. What is left is what the processors leave, in their order: temperature, ``top_k`` (with all
that are as likely as the last one), ``top_p``, ``min_p``. Of tokens that are equally likely ``top_p`` takes those with
the lower numbers first; the processors' sort takes any.

Sums and chances are fp64. Memory: a few numbers for each token of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conmoe_edge.offload.generation.sampling_settings import SamplingSettings

_SLACK = 0.999
"""What the first pass, in fp32, leaves is this much more than what is looked at closely."""


@dataclass(frozen=True, slots=True)
class Likely:
    """Numbers of tokens [n], and their chances fp64 [n], whose sum is 1."""

    tokens: NDArray[np.int64]
    chances: NDArray[np.float64]

    def at(self, share: float) -> int:
        """The token at ``share``, from 0 on and less than 1, of the chances one behind the other: with shares that are
        drawn evenly, every token as often as its chance says.
        """
        edges = self.chances.cumsum()
        place = int(edges.searchsorted(share * edges[-1], side="right"))
        # Rounding may lead to the end, where chances may be none.
        return int(self.tokens[min(place, int(self.chances.nonzero()[0][-1]))])


def likely(scores: NDArray[np.float32], settings: SamplingSettings) -> Likely | None:
    """Of ``scores`` [V] and filled settings with a temperature; ``None`` where the greatest score is no number."""
    temperature, top_k = settings.temperature, settings.top_k
    top_p, min_p = settings.top_p, settings.min_p
    assert temperature and top_p is not None, "the settings were filled"
    best = scores.max()
    if not np.isfinite(best):
        return None
    count = len(scores)
    tokens, total = np.arange(count), 0.0
    if top_k and top_k < count:
        tokens = (scores >= np.partition(scores, count - top_k)[count - top_k]).nonzero()[0]
    elif top_p < 1.0 or min_p:
        sizes = np.exp((scores - best) / np.float32(temperature))
        total = float(sizes.sum(dtype=np.float64))
        # As many as there are, each with less than this, have less than ``top_p`` leaves out.
        least = max((1.0 - top_p) / count * total, min_p or 0.0)
        tokens = (sizes >= _SLACK * least).nonzero()[0]
    if top_p < 1.0:
        tokens = tokens[np.argsort(-scores[tokens], kind="stable")]
    sizes = np.exp((scores[tokens].astype(np.float64) - best) / temperature)
    if top_p < 1.0:
        edges = sizes.cumsum()
        stay = edges - sizes < top_p * (total or edges[-1])
        stay[0] = True
        tokens, sizes = tokens[stay], sizes[stay]
    if min_p:
        stay = sizes >= min_p  # of the likeliest, whose size is 1
        tokens, sizes = tokens[stay], sizes[stay]
    return Likely(tokens, sizes / sizes.sum())
