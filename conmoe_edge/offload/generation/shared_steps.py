"""A step that several answers share: the next token of each, in forwards that read what they share once.

Every answer's scores are the bits that it has alone (``fastpath/together.py``), so whether a step is shared, and with
whom, says nothing of the answers. Memory: scores for each answer, beside their caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from conmoe_edge.errors import ConmoeError
from conmoe_edge.offload.fastpath.decoder_layer import Apart
from conmoe_edge.offload.fastpath.together import Together
from conmoe_edge.offload.runtime import Runtime
from conmoe_edge.offload.storage.out_of_memory import is_out_of_memory

MOST_TOGETHER = 16
"""Answers in one step: so few that their activations and scores need less room than a chunk of a prompt."""


class Continued(Protocol):
    """An answer that goes on: all of its ``tokens``, of which the first ``prompt_length`` are the prompt, and what is
    ``cached`` of them, a ``CachedTokens``.
    """

    cached: Any
    tokens: list[int]
    prompt_length: int


def may_share(runtime: Runtime) -> Together | None:
    """What takes shared steps through a loaded model; ``None`` where its answers take turns."""
    return None if runtime.fast_path is None else runtime.fast_path.together


def is_next_single(answer: Continued) -> bool:
    """Whether the next forward of ``answer`` takes one token that was made, so that it can be shared."""
    return answer.cached.one_call(answer.tokens, answer.prompt_length) is not None


@torch.no_grad()
def shared_scores(together: Together, answers: Sequence[Continued]) -> list[Tensor] | None:
    """Scores [1, V] of what follows each of ``answers``, for which ``is_next_single`` holds; for ``Generation.draw``.

    ``None`` where they have to take their steps one by one: there a forward that failed fails again, and alone.
    """
    calls = []
    for answer in answers:
        call = answer.cached.one_call(answer.tokens, answer.prompt_length)
        assert call is not None, "is_next_single has looked"
        calls.append(call)
    try:
        scores = together.scores(calls)
    except (Apart, ConmoeError):
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    for answer in answers:
        answer.cached.took(answer.tokens[-1])
    return scores
