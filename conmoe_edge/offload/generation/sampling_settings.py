"""How the tokens of an answer are drawn and where it ends: one type for chat, serve, bench and the
Python API. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from conmoe_edge.errors import UsageError

if TYPE_CHECKING:
    from conmoe_edge.offload.generation.grammar import Grammar
    from conmoe_edge.offload.generation.thinking import ThinkingMarks

LONGEST_ANSWER = 1024
"""Tokens of an answer where neither the caller nor the model's generation config says."""

MOST_PENALTY = 2.0
MOST_BIAS = 100.0
MOST_LOGPROBS = 20

_RANGES = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "top_k": (0, math.inf),
    "max_tokens": (1, math.inf),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-MOST_PENALTY, MOST_PENALTY),
    "presence_penalty": (-MOST_PENALTY, MOST_PENALTY),
    "logprobs": (0, MOST_LOGPROBS),
}


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """``None`` leaves a field to the model's generation config (``filled``).

    Attributes:
        max_tokens: of the answer, the end mark included.
        temperature: 0 is greedy.
        top_p: draw from the likeliest tokens that have this share of the probability together.
        top_k: draw from so many of the likeliest tokens; 0 for all.
        repetition_penalty: divides the scores of tokens that are there already; 1 for none.
        seed: the same seed gives the same answer; ``None`` draws anew each time.
        stop: strings that end the answer and are not part of it.
        min_p: leave out tokens that are less likely than this share of the likeliest one; 0 for none.
        frequency_penalty: taken from a token's score for each time that the answer has it already.
        presence_penalty: taken once from the score of each token that the answer has already.
        logit_bias: pairs of a token and what is added to its score, from -100 to 100.
        logprobs: note with each token its log-probability, and those of so many of the likeliest; ``None`` for none.
        grammar: what the answer has to be, once its reasoning is over; ``None`` for anything.
        thinking: which tokens begin and end the model's reasoning, and how long it may be; ``None`` where nobody asks.
        shown: control tokens that stay in the text of the answer; the others are left out of it.

    Raises:
        UsageError: a value is outside its range.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    thinking: ThinkingMarks | None = None
    shown: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise UsageError("stop is one string.", "it is a tuple of strings", "stop=(text,)")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                limit = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
                raise UsageError(
                    f"{name} cannot be {value}.", f"it is {limit}", f"{name}={low:g}, say"
                )
        for token, bias in self.logit_bias:
            if not -MOST_BIAS <= bias <= MOST_BIAS:
                raise UsageError(
                    f"logit_bias cannot be {bias} for token {token}.",
                    f"it is from {-MOST_BIAS:g} to {MOST_BIAS:g}",
                    f"{MOST_BIAS:g} to have it, {-MOST_BIAS:g} to never have it",
                )

    def filled(self, generation_config: Any) -> SamplingSettings:
        """With the model's own values where a field is ``None``; afterwards only ``seed`` and what nobody asked
        for may be."""
        own = generation_config
        usual = {
            "max_tokens": own.max_new_tokens or LONGEST_ANSWER,
            "temperature": (own.temperature or 1.0) if own.do_sample else 0.0,
            "top_p": own.top_p or 1.0,
            "top_k": own.top_k or 0,
            "repetition_penalty": own.repetition_penalty or 1.0,
            "min_p": own.min_p or 0.0,
        }
        return replace(self, **{k: v for k, v in usual.items() if getattr(self, k) is None})


GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, min_p=0.0)
"""The likeliest token each time, whatever the model's generation config says."""
