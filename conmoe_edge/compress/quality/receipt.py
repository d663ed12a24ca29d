"""The quality receipt: what consolidation cost, measured on held-out text.

Original and written package give logits for the same sequences; per domain and over all:

- ``loss_original``, ``loss_consolidated``: mean negative log-likelihood, nats a token
- ``perplexity_ratio``: exp(loss_consolidated - loss_original)
- ``kl``: mean over positions of KL(original || consolidated), nats
- ``top1_agreement``: share of positions with the same most likely token
- ``overlap``: mean over positions of the sum of min(p, q)

and over all ``exact_match``: by kind the counts of ``match_counts.py``, where items were looked for.

Padding, and the position after it, are not counted. Peak memory: the logits of one sequence, twice,
and a few blocks of 64 positions in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.compress.quality.exact_match import MatchTracker
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.layer_stream import sequence_logits
from conmoe_edge.compress.stream.match_places import MatchPlaces
from conmoe_edge.model.streaming import StreamedModel

_POSITIONS = 64


@dataclass(slots=True)
class _Sums:
    positions: int = 0
    original: float = 0.0
    consolidated: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    overlap: float = 0.0

    def add(self, other: _Sums) -> None:
        for name in _Sums.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def result(self) -> dict[str, Any]:
        count = max(1, self.positions)
        before, after = self.original / count, self.consolidated / count
        return {
            "tokens": self.positions,
            "loss_original": before,
            "loss_consolidated": after,
            "perplexity_ratio": math.exp(min(50.0, after - before)),
            "kl": self.kl / count,
            "top1_agreement": self.agreed / count,
            "overlap": self.overlap / count,
        }


class ReceiptTracker:
    """Adds up the comparison sequence by sequence."""

    def __init__(self, tokens: TokenSet) -> None:
        self._tokens = tokens
        self._sums: dict[str, _Sums] = {}

    def add(self, row: int, original: Tensor, consolidated: Tensor) -> None:
        """Compare the logits [T, V] of one sequence."""
        sums = self._sums.setdefault(self._tokens.domains[row], _Sums())
        for targets, before, after in _predicted(self._tokens, row, original, consolidated):
            sums.add(_compare(targets, before, after))

    def result(self) -> dict[str, Any]:
        """The receipt."""
        total = _Sums()
        for sums in self._sums.values():
            total.add(sums)
        by_domain: Mapping[str, Any] = {
            name: sums.result() for name, sums in sorted(self._sums.items())
        }
        return {**total.result(), "per_domain": by_domain}


def compare_heads(
    reference: StreamedModel,
    before: Tensor,
    model: StreamedModel,
    after: Tensor,
    tokens: TokenSet,
    places: MatchPlaces | None = None,
) -> dict[str, Any]:
    """The receipt: hidden states [N, T, H] behind the last layers through norm and head, one sequence at a time.

    What is outside the decoder layers must be loaded in both. ``places``: of ``tokens``.
    """
    tracker = ReceiptTracker(tokens)
    matches = None if places is None else MatchTracker(places)
    for row in range(tokens.ids.shape[0]):
        wanted = sequence_logits(reference, tokens, before, row)
        found = sequence_logits(model, tokens, after, row)
        tracker.add(row, wanted, found)
        if matches is not None:
            matches.add(row, found, wanted)
        del wanted, found  # before the next ones are made
    counts = {} if matches is None else matches.result()
    exact = {"exact_match": {kind: asdict(one) for kind, one in counts.items()}} if counts else {}
    return {**tracker.result(), **exact}


class LossTracker:
    """The loss of one model alone, sequence by sequence."""

    def __init__(self, tokens: TokenSet) -> None:
        self._tokens = tokens
        self._sums: dict[str, tuple[int, float]] = {}

    def add(self, row: int, logits: Tensor) -> None:
        """Add the logits [T, V] of one sequence."""
        count, loss = self._sums.get(self._tokens.domains[row], (0, 0.0))
        for targets, found in _predicted(self._tokens, row, logits):
            loss -= _likelihood(torch.log_softmax(found.float(), dim=-1), targets)
            count += targets.numel()
        self._sums[self._tokens.domains[row]] = (count, loss)

    def result(self) -> tuple[tuple[int, float], dict[str, tuple[int, float]]]:
        """(tokens, mean loss) over all and by domain."""
        by_domain = {
            name: (count, loss / max(1, count))
            for name, (count, loss) in sorted(self._sums.items())
        }
        count = sum(count for count, _ in self._sums.values())
        loss = sum(loss for _, loss in self._sums.values())
        return (count, loss / max(1, count)), by_domain


def _predicted(tokens: TokenSet, row: int, *logits: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some positions of a sequence at a time: the tokens [n] that count, and for each of the logits [T, V] those [n, V]
    that say them.
    """
    mask = tokens.mask[row]
    valid = (mask[1:] & mask[:-1]).nonzero().squeeze(1)
    for places in valid.split(_POSITIONS):
        yield tokens.ids[row][places + 1], *(one[places.to(one.device)] for one in logits)


def _likelihood(log_probabilities: Tensor, targets: Tensor) -> float:
    """Sum of the targets' log-probabilities; [n, V] and [n]."""
    rows = torch.arange(targets.numel(), device=log_probabilities.device)
    return float(log_probabilities[rows, targets.to(rows.device)].double().sum())


def _compare(targets: Tensor, original: Tensor, consolidated: Tensor) -> _Sums:
    """targets [n], logits [n, V] each."""
    p = torch.log_softmax(original.float(), dim=-1)
    q = torch.log_softmax(consolidated.float(), dim=-1)
    found = _Sums(
        positions=targets.numel(),
        original=-_likelihood(p, targets),
        consolidated=-_likelihood(q, targets),
        agreed=int((p.argmax(-1) == q.argmax(-1)).sum()),
    )
    weights = p.exp()
    # In place from here on: a row is as long as the vocabulary.
    found.kl = max(0.0, float(p.sub_(q).mul_(weights).sum(-1).double().sum()))
    found.overlap = float(torch.minimum(weights, q.exp_(), out=q).sum(-1).double().sum())
    return found
