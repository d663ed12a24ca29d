"""Before the consolidation: what each layer is worth to the output, and how much each gets for that.

First the original over a few calibration sequences, and beside it, from every layer on, the stream in
which that layer alone was narrowed with the uniform number of bytes; ``budgets`` makes a division of
the bytes from that. Then the trial: the whole model with the uniform division, with this one, and
with one half way; the one whose final distribution is nearest to the original's is taken (ties to
the uniform one). Stand-ins are experts with the neurons that are worth most, their down projections
making up for the others; nothing is refitted, and what has gone gives nothing.

What is measured is measured on other sequences than the stand-ins are made from, and the trial on
others again.

On disk between the two: the tokens that stand-ins are made from, once a layer.

Peak memory: one decoder layer, the hidden states of a few sequences once for every MoE layer, the
activations of as many tokens in one layer, the logits of one sequence twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from conmoe_edge.checkpoint.format.slot_map import NONE
from conmoe_edge.compress.methods.interface import LayerView, Parts, ScopeView
from conmoe_edge.compress.methods.narrowing import Narrowing, narrowings
from conmoe_edge.compress.methods.rebuild import (
    activations,
    gates_of,
    solved,
    whole_width,
    with_down,
)
from conmoe_edge.compress.quality.receipt import ReceiptTracker
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.solvers.facility import slot_map_of
from conmoe_edge.compress.solvers.layer_budgets import LayerWorth, between, share_out
from conmoe_edge.compress.solvers.widths import choose, layer_curve
from conmoe_edge.compress.stats.layer_tokens import LayerTokens, TokenRecorder
from conmoe_edge.compress.stats.statistics import StatisticsTracker
from conmoe_edge.compress.stream.expert_hooks import MappedTap, RoutedTap, attach
from conmoe_edge.compress.stream.layer_stream import (
    Beside,
    open_stream,
    run_layer,
    sequence_logits,
)
from conmoe_edge.compress.stream.scope_weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.compress.stream.streamed_model import timed_layer
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.levers import scopes

_MOST_FITTED, _FEWEST_FITTED, _FITTED_SHARE = 6, 2, 4
"""Sequences that stand-ins are made from, at most this part of all."""
_PASSES = 18
_FEWEST_SEQUENCES, _MOST_SEQUENCES = 1, 3


def sequences(layers: int) -> int:
    """Calibration sequences that are measured on. Every layer's own stream goes through all layers behind it, so
    the cost grows with the square of the depth; with fewer sequences it stays a share of the whole.
    """
    return max(_FEWEST_SEQUENCES, min(_MOST_SEQUENCES, _PASSES // layers))


def _fitted(run: Run) -> int:
    wanted = len(run.job.train.domains) // _FITTED_SHARE
    return max(_FEWEST_FITTED, min(_MOST_FITTED, wanted))


def survey(run: Run, model: StreamedModel) -> dict[int, int]:
    """MoE layer -> prototypes, or parts of them where their widths differ."""
    with run.clock.part("survey"):
        found: dict[int, _Narrowed] = {}
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


def _worth(run: Run, model: StreamedModel, found: dict[int, _Narrowed]) -> dict[int, LayerWorth]:
    """What each layer is worth; ``found`` is filled."""
    fitted = _Originals(run, model, _fitted(run), 0)
    measured = _Originals(run, model, sequences(run.layers), 1, run.layers)
    changed: dict[int, torch.Tensor] = {}
    for index in range(run.layers):
        run.meter.announce("survey", index)
        with timed_layer(model, index, run.clock, with_experts=True):
            entered = measured.stream.hidden.clone()
            recorded = fitted.recorded(index)
            measured.all_through(index, [*changed.values()])
            if recorded is not None:
                recorded.save(run.work.tokens(index))  # for the trial
                module = model.experts[index][1]
                layer = _LoadedLayer(run, module, index, recorded)
                found[index] = layer.narrowed()
                mapped = layer.stand_ins(found[index], run.sizes.uniform((index,)))
                attach(module, mapped)
                changed[index] = entered
                measured.beside.run_layer(index, [entered], mapped)
                attach(module, RoutedTap())  # the tap holds on to the layer's weights
    left = measured.divergences([changed[layer] for layer in found])
    return {
        layer: LayerWorth(one.curve(), divergence)
        for (layer, one), divergence in zip(found.items(), left, strict=True)
    }


def _trial(
    run: Run,
    model: StreamedModel,
    found: Mapping[int, _Narrowed],
    divisions: Sequence[Mapping[int, int]],
) -> list[float]:
    """The divergence of the whole model's output with every division."""
    measured = _Originals(run, model, sequences(run.layers), 2, len(divisions))
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
            layer = _LoadedLayer(run, module, index, recorded)
            for one, division in zip(tried, divisions, strict=True):
                mapped = layer.stand_ins(found[index], division[index])
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


@dataclass(frozen=True, slots=True)
class _Narrowed:
    """What the experts of one layer lose with no neuron and in the widths that they may have.

    ``sizes``: bytes of the records; ``unit``: bytes that are given at once; ``units``: of all experts.
    """

    experts: tuple[Narrowing, ...]
    sizes: tuple[int, ...]
    unit: int
    units: int

    def curve(self) -> tuple[float, ...]:
        """The error that is left in 0, 1, ... units."""
        return layer_curve([one.errors for one in self.experts], self.sizes, self.unit, self.units)

    def chosen(self, units: int) -> list[int]:
        """The place of every expert's width in so many units."""
        return choose([one.errors for one in self.experts], self.sizes, units * self.unit)


class _LoadedLayer:
    """A loaded layer and its tokens, from which narrow experts are made."""

    def __init__(self, run: Run, module: nn.Module, index: int, tokens: LayerTokens) -> None:
        self._run, self._index, self._tokens = run, index, tokens
        experts, sizes = run.sizes.experts(index), run.sizes
        seen = StatisticsTracker(experts.count).result()
        self._scope = ScopeView(
            sizes.pool((index,)),
            (LayerView(index, experts.count, experts.top_k, seen, tokens),),
            ScopeWeights({index: LoadedLayer(module)}, matrix_views(module)),
            lambda: torch.empty(0),
            module,
            sizes.widths(index),
            sizes.sizes(index),
            dtype=run.dtype,
            device=run.job.device,
        )
        self._gates = gates_of(tokens, experts.count)
        self._grams: dict[int, torch.Tensor] = {}
        self._made: dict[tuple[int, int], Parts] = {}  # divisions have much in common

    def narrowed(self) -> _Narrowed:
        """What its experts lose, by its tokens."""
        sizes, unit = self._scope.sizes, self._run.sizes.unit(self._index)
        grams, found = narrowings(self._scope, self._tokens, self._gates)
        self._grams.update(enumerate(grams))
        return _Narrowed(tuple(found), (0, *sizes), unit, len(found) * sizes[-1] // unit)

    def stand_ins(self, narrowed: _Narrowed, units: int) -> MappedTap:
        """The layer in so many units, its down projections corrected on its tokens."""
        parts, chosen = {}, narrowed.chosen(units)
        for expert, place in enumerate(chosen):
            if place:
                if (expert, place) not in self._made:
                    neurons = narrowed.experts[expert].neurons[place - 1]
                    self._made[expert, place] = self._parts(expert, neurons)
                parts[expert] = self._made[expert, place]
        targets = [expert if place else NONE for expert, place in enumerate(chosen)]
        slot_map = slot_map_of(self._index, targets)
        return MappedTap(SlotTensors.of(slot_map, None, self._scope.device), parts)

    def _parts(self, expert: int, neurons: torch.Tensor) -> Parts:
        """In the model's own numbers, so that a whole expert is no copy."""
        scope = self._scope
        own = scope.weights.parts(scope.pool[expert])
        if len(neurons) == whole_width(scope):
            return own
        if expert not in self._grams:
            alpha = self._gates[:, expert]
            self._grams[expert] = activations(scope, self._tokens, expert, alpha).gram
        _, down = solved(scope, expert, self._grams[expert], neurons)
        found = with_down(scope, expert, neurons, down)
        return {name: part.to(own[name].device, own[name].dtype) for name, part in found.items()}
