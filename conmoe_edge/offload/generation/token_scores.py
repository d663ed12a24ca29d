"""The log-probability of a token that was made, and those of the likeliest in its place.

They are the model's own, in nats: before a temperature, a penalty, a bias or a grammar. Memory: 8 bytes for each of
the likeliest, and about 300 for the objects.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Of one token.

    Attributes:
        token, logprob: of the one that was made.
        likeliest: the tokens that were the likeliest in its place, the first one first.
        logprobs: of those.
    """

    token: int
    logprob: float
    likeliest: array[int]
    logprobs: array[float]


def token_score(scores: Tensor, token: int, count: int) -> TokenScore:
    """Of ``token`` by the model's ``scores`` [1, V], with ``count`` of the likeliest."""
    all_of_them = torch.log_softmax(scores[0].float(), dim=-1)
    values, places = all_of_them.topk(min(count, len(all_of_them)))
    return TokenScore(
        token,
        float(all_of_them[token]),
        array("i", places.tolist()),
        array("f", values.tolist()),
    )
