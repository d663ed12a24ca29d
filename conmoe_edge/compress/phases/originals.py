"""The original over a few calibration sequences, and changed models beside it: what is tried before a consolidation.

Peak memory: the hidden states of the sequences once for the original and once for every model beside it; the logits of
one sequence twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from conmoe_edge.compress.quality.receipt import ReceiptTracker
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.stats.layer_tokens import LayerTokens, TokenRecorder
from conmoe_edge.compress.stream.expert_hooks import RoutedTap, attach
from conmoe_edge.compress.stream.layer_stream import (
    Beside,
    open_stream,
    run_layer,
    sequence_logits,
)
from conmoe_edge.model.streaming import StreamedModel

_MOST_FITTED, _FEWEST_FITTED, _FITTED_SHARE = 6, 2, 4
"""Sequences that something is made from, at most this part of all."""
SEQUENCES = 3
"""Calibration sequences that something is measured on."""


def fitted_sequences(run: Run) -> int:
    """How many sequences something is made from."""
    wanted = len(run.job.train.domains) // _FITTED_SHARE
    return max(_FEWEST_FITTED, min(_MOST_FITTED, wanted))


class Originals:
    """The original over a few sequences, layer by layer; ``beside``: up to ``others`` other models over them."""

    def __init__(
        self, run: Run, model: StreamedModel, count: int, after: int, others: int = 0
    ) -> None:
        self._model = model
        self._tokens = run.job.train.some(count, after=after)
        model.load_outside()
        self.stream = open_stream(model, self._tokens)
        self.beside = Beside(model, self._tokens, 1 + others)
        model.drop_outside()

    def all_through(self, index: int, others: Sequence[torch.Tensor]) -> None:
        """Through a loaded layer, and the hidden states ``others`` of other models too."""
        self.beside.run_layer(index, [self.stream.hidden, *others], self._tap(index))

    def recorded(self, index: int) -> LayerTokens | None:
        """Through a loaded layer; the tokens that entered its experts, ``None`` where it has none."""
        tap = self._tap(index)
        if tap is not None:
            tap.tokens = TokenRecorder()
        run_layer(self._model, index, self.stream, tap)
        return None if tap is None or tap.tokens is None else tap.tokens.result()

    def _tap(self, index: int) -> RoutedTap | None:
        """A new one on the layer's experts."""
        if index not in self._model.experts:
            return None
        tap = RoutedTap()
        attach(self._model.experts[index][1], tap)
        return tap

    def changed_by(self, changed: torch.Tensor) -> float:
        """How far another stream is from the original's here: the mean over tokens of |difference|^2 / |original|^2."""
        ours = self.stream.real_rows(self.stream.hidden).double()
        gone = self.stream.real_rows(changed).double() - ours
        lengths = ours.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        return float((gone.square().sum(1) / lengths).mean())

    def divergences(self, changed: Sequence[torch.Tensor]) -> list[float]:
        """Of the final distribution with every changed stream from the original's: the mean KL, nats."""
        model, tokens = self._model, self._tokens
        model.load_outside()
        trackers = [ReceiptTracker(tokens) for _ in changed]
        for row in range(len(tokens.domains)):
            wanted = sequence_logits(model, tokens, self.stream.hidden, row)
            for tracker, hidden in zip(trackers, changed, strict=True):
                tracker.add(row, wanted, sequence_logits(model, tokens, hidden, row))
        model.drop_outside()
        return [tracker.result()["kl"] for tracker in trackers]
