"""Before the consolidation: what each layer is worth to the output, and how much each gets for that.

Worth: the original goes over a few calibration sequences. Every layer also runs narrowed, with the uniform number of
bytes, on what the original has in front of it, and what that changes in the residual stream, as a share of it, is the
layer's worth. ``layer_budgets.py`` makes a division of the bytes from that. A layer is measured at its place alone, so
the cost is linear in the depth.

Trial: the whole model with the uniform division, with this one, and with one half way. The one whose final distribution
is nearest to the original's is taken (ties to the uniform one).

A narrowed layer has stand-ins for its experts (``methods/narrowing.py``); nothing is refitted. Stand-ins are made from
some sequences, worth is measured on others, and the trial on others again. The tokens of the first wait in the work
folder for the trial.

Peak memory: one decoder layer, the hidden states of a few sequences once for every division, the activations of as
many tokens in one layer, the logits of one sequence twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from conmoe_edge.compress.methods.interface import LayerView, ScopeView
from conmoe_edge.compress.methods.stand_ins import NarrowedLayer, StandInLayer
from conmoe_edge.compress.quality.receipt import ReceiptTracker
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.solvers.layer_budgets import LayerWorth, between, share_out
from conmoe_edge.compress.stats.layer_tokens import LayerTokens, TokenRecorder
from conmoe_edge.compress.stats.statistics import StatisticsTracker
from conmoe_edge.compress.stream.expert_hooks import RoutedTap, attach
from conmoe_edge.compress.stream.layer_stream import (
    Beside,
    open_stream,
    run_layer,
    sequence_logits,
)
from conmoe_edge.compress.stream.scope_weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.compress.stream.streamed_model import timed_layer
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.levers import scopes

_MOST_FITTED, _FEWEST_FITTED, _FITTED_SHARE = 6, 2, 4
"""Sequences that stand-ins are made from, at most this part of all."""
SEQUENCES = 3
"""Calibration sequences that worth, and then the divisions, are measured on."""


def _fitted(run: Run) -> int:
    wanted = len(run.job.train.domains) // _FITTED_SHARE
    return max(_FEWEST_FITTED, min(_MOST_FITTED, wanted))


def survey(run: Run, model: StreamedModel) -> dict[int, int]:
    """MoE layer -> prototypes, or parts of them where their widths differ."""
    with run.clock.part("survey"):
        found: dict[int, NarrowedLayer] = {}
        worth = _worth(run, model, found)
        uniform, shared = {}, {}
        for alike in scopes(run.job.anatomy, run.layers):  # runs of layers whose records are alike
            each = run.sizes.uniform(alike[:1])
            uniform.update(dict.fromkeys(alike, each))
            shared.update(zip(alike, share_out([worth[one] for one in alike], each), strict=True))
        half = dict(zip(uniform, between([*uniform.values()], [*shared.values()]), strict=True))
        divisions = [uniform]
        divisions += [one for one in (shared, half) if one not in divisions]
        left = _trial(run, model, found, divisions) if len(divisions) > 1 else [0.0]
    return divisions[left.index(min(left))]


def _worth(
    run: Run, model: StreamedModel, found: dict[int, NarrowedLayer]
) -> dict[int, LayerWorth]:
    """What each layer is worth; ``found`` is filled."""
    fitted = _Originals(run, model, _fitted(run), 0)
    measured = _Originals(run, model, SEQUENCES, 1)
    worth = {}
    for index in range(run.layers):
        run.meter.announce("survey", index)
        with timed_layer(model, index, run.clock, with_experts=True):
            changed = measured.stream.hidden.clone()
            recorded = fitted.recorded(index)
            measured.all_through(index, [])
            if recorded is not None:
                recorded.save(run.work.tokens(index))  # for the trial
                module = model.experts[index][1]
                layer = _stand_ins(run, module, index, recorded)
                found[index] = layer.narrowed()
                mapped = layer.tap(found[index], run.sizes.uniform((index,)))
                attach(module, mapped)
                measured.beside.run_layer(index, [changed], mapped)
                attach(module, RoutedTap())  # the tap holds on to the layer's weights
                worth[index] = LayerWorth(found[index].curve(), measured.changed_by(changed))
    return worth


def _trial(
    run: Run,
    model: StreamedModel,
    found: Mapping[int, NarrowedLayer],
    divisions: Sequence[Mapping[int, int]],
) -> list[float]:
    """The divergence of the whole model's output with every division."""
    measured = _Originals(run, model, SEQUENCES, 2, len(divisions))
    tried = [measured.stream.hidden.clone() for _ in divisions]
    for index in range(run.layers):
        run.meter.announce("trial", index)
        with timed_layer(model, index, run.clock, with_experts=True):
            if index not in found:
                measured.all_through(index, tried)
                continue
            measured.all_through(index, [])
            module = model.experts[index][1]
            recorded = LayerTokens.load(run.work.tokens(index))
            layer = _stand_ins(run, module, index, recorded)
            for one, division in zip(tried, divisions, strict=True):
                mapped = layer.tap(found[index], division[index])
                attach(module, mapped)
                measured.beside.run_layer(index, [one], mapped)
            attach(module, RoutedTap())  # the tap holds on to the layer's weights
    return measured.divergences(tried)


class _Originals:
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


def _stand_ins(run: Run, module: nn.Module, index: int, tokens: LayerTokens) -> StandInLayer:
    """Of a loaded layer, made from ``tokens``."""
    experts, sizes = run.sizes.experts(index), run.sizes
    seen = StatisticsTracker(experts.count).result()
    scope = ScopeView(
        sizes.pool((index,)),
        (LayerView(index, experts.count, experts.top_k, seen, tokens),),
        ScopeWeights({index: LoadedLayer(module)}, matrix_views(module)),
        lambda: torch.empty(0),
        module,
        sizes.widths(index),
        sizes.sizes(index),
        dtype=run.dtype,
        device=run.job.device,
        record=lambda width, kind="": sizes.layout(index, kind or sizes.kinds[0], width),
        options=sizes.options(index),
        gone=sizes.gone(index),
    )
    return StandInLayer(scope, tokens, sizes.unit(index))
