"""How the tokens of an answer are drawn and where it ends: one type for chat, serve, bench and the
Python API. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from conmoe_edge.errors import UsageError

LONGEST_ANSWER = 1024
"""Tokens of an answer where neither the caller nor the model's generation config says."""

_RANGES = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "top_k": (0, math.inf),
    "max_tokens": (1, math.inf),
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

    def filled(self, generation_config: Any) -> SamplingSettings:
        """With the model's own values where a field is ``None``; afterwards only ``seed`` may be."""
        own = generation_config
        usual = {
            "max_tokens": own.max_new_tokens or LONGEST_ANSWER,
            "temperature": (own.temperature or 1.0) if own.do_sample else 0.0,
            "top_p": own.top_p or 1.0,
            "top_k": own.top_k or 0,
            "repetition_penalty": own.repetition_penalty or 1.0,
        }
        return replace(self, **{k: v for k, v in usual.items() if getattr(self, k) is None})


GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
"""The likeliest token each time, whatever the model's generation config says."""
