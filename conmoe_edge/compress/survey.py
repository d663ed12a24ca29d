"""Before the consolidation: what each layer is worth to the output, and how much each gets for that.

First the original over a few calibration sequences, and beside it, from every layer on, the stream in
which that layer alone was narrowed with the uniform number of bytes; ``budgets`` makes a division of
the bytes from that. Then the trial: over other sequences, the whole model with the uniform division,
with this one, and with one half way; the one whose final distribution is nearest to the original's
is taken (ties to the uniform one). Stand-ins are experts with the neurons that are worth most, their
down projections making up for the others; nothing is refitted, and what has gone gives nothing.

Peak memory: one decoder layer, the hidden states of a few sequences once for every MoE layer, the
activations of their tokens in one layer, the logits of one sequence twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from conmoe_edge.checkpoint.manifest import ExpertId, SlotRecord
from conmoe_edge.compress.budgets import LayerWorth, between, share_out
from conmoe_edge.compress.calibration import TokenSet
from conmoe_edge.compress.layer_tokens import LayerTokens, TokenRecorder
from conmoe_edge.compress.methods.interface import LayerView, ScopeView
from conmoe_edge.compress.neurons import narrowings
from conmoe_edge.compress.rebuild import gates_of, prototype
from conmoe_edge.compress.receipt import ReceiptTracker
from conmoe_edge.compress.run import Run
from conmoe_edge.compress.statistics import StatisticsTracker
from conmoe_edge.compress.stream import (
    Stream,
    compute_dtype,
    open_stream,
    run_layer,
    sequence_logits,
)
from conmoe_edge.compress.taps import MappedTap, RoutedTap, attach
from conmoe_edge.compress.weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.compress.widths import choose, layer_curve
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.levers import scopes

_PASSES = 64
_FEWEST_SEQUENCES, _MOST_SEQUENCES = 2, 8


def sequences(layers: int) -> int:
    """Calibration sequences of a survey. Every layer's own stream goes through all layers behind it, so
    the cost grows with the square of the depth; with fewer sequences it stays a share of the whole.
    """
    return max(_FEWEST_SEQUENCES, min(_MOST_SEQUENCES, _PASSES // layers))


def survey(run: Run, model: StreamedModel) -> None:
    """Divide the prototypes between the layers, into the journal."""
    with run.clock.part("survey"):
        worth = _worth(run, model)
        uniform, shared = {}, {}
        for alike in scopes(run.job.anatomy, run.layers):  # runs of layers whose records are alike
            each = run.uniform(alike[:1])
            uniform.update(dict.fromkeys(alike, each))
            shared.update(zip(alike, share_out([worth[one] for one in alike], each), strict=True))
        half = dict(zip(uniform, between([*uniform.values()], [*shared.values()]), strict=True))
        divisions = [uniform]
        divisions += [one for one in (shared, half) if one not in divisions]
        left = _trial(run, model, divisions) if len(divisions) > 1 else [0.0]
    for layer, count in divisions[left.index(min(left))].items():
        run.journal.budgets[str(layer)] = count
    run.save("calibrate", 0)


def _worth(run: Run, model: StreamedModel) -> dict[int, LayerWorth]:
    """What each layer is worth."""
    tokens = run.job.train.some(sequences(run.layers))
    model.load_outside()
    stream = open_stream(model, tokens)
    model.drop_outside()
    changed: dict[int, torch.Tensor] = {}
    curves: dict[int, tuple[float, ...]] = {}
    for index in range(run.layers):
        run.announce("survey", index)
        with run.loaded(model, index):
            found = _one_layer(run, model, index, stream, changed)
            if found is not None:
                curves[index] = found
    left = _divergences(run, model, tokens, stream, [changed[layer] for layer in curves])
    return {
        layer: LayerWorth(curve, divergence)
        for (layer, curve), divergence in zip(curves.items(), left, strict=True)
    }


def _trial(
    run: Run, model: StreamedModel, divisions: Sequence[Mapping[int, int]]
) -> list[float]:
    """The divergence of the whole model's output with every division."""
    tokens = run.job.train.some(sequences(run.layers), after=1)
    model.load_outside()
    stream = open_stream(model, tokens)
    model.drop_outside()
    tried = [Stream(stream.batches, stream.keep, stream.hidden.clone()) for _ in divisions]
    for index in range(run.layers):
        run.announce("trial", index)
        with run.loaded(model, index):
            if index not in model.experts:
                for one in (stream, *tried):
                    run_layer(model, index, one, None)
                continue
            module = model.experts[index][1]
            own = RoutedTap()
            own.tokens = TokenRecorder()
            attach(module, own)
            run_layer(model, index, stream, own)
            layer = _Narrowed(run, module, index, own.tokens.result())
            for one, division in zip(tried, divisions, strict=True):
                mapped = layer.stand_ins(division[index])
                attach(module, mapped)
                run_layer(model, index, one, mapped)
            attach(module, RoutedTap())  # the tap holds on to the layer's weights
    return _divergences(run, model, tokens, stream, [one.hidden for one in tried])


class _Narrowed:
    """The experts of a loaded layer in the widths that they may have, by its own tokens."""

    def __init__(self, run: Run, module: nn.Module, index: int, tokens: LayerTokens) -> None:
        self._run, self._module, self._index = run, module, index
        count = run.experts(index).count
        layer = LayerView(
            index, count, run.top_k(index), StatisticsTracker(count).result(), tokens
        )
        self._scope = ScopeView(
            tuple(ExpertId(index, expert) for expert in range(count)),
            (layer,),
            ScopeWeights({index: LoadedLayer(module)}, matrix_views(module)),
            lambda: torch.empty(0),
            module,
            run.widths(index),
            run.sizes(index),
            0,
            compute_dtype(run.job.device, getattr(torch, run.job.anatomy.dtype)),
            run.job.device,
        )
        gates = gates_of(tokens, count)
        self._own, self._found = narrowings(self._scope, tokens, gates)

    def curve(self) -> tuple[float, ...]:
        """The error that is left in 0, 1, ... units."""
        run, index = self._run, self._index
        sizes = (0, *self._scope.sizes)
        unit = run.unit(index)
        units = run.experts(index).count * sizes[-1] // unit
        return layer_curve([one.errors for one in self._found], sizes, unit, units)

    def stand_ins(self, units: int) -> MappedTap:
        """The layer in so many units."""
        scope, sizes = self._scope, (0, *self._scope.sizes)
        curves = [one.errors for one in self._found]
        chosen = choose(curves, sizes, units * self._run.unit(self._index))
        parts, slots = {}, []
        for expert, place in enumerate(chosen):
            slots.append(SlotRecord(scope.pool[expert] if place else None))
            if place:
                neurons = self._found[expert].neurons[place - 1]
                whole, _ = prototype(scope, expert, self._own[expert], neurons)
                parts[scope.pool[expert]] = {
                    name: part.to(scope.device, scope.dtype) for name, part in whole.items()
                }
        return MappedTap(slots, parts, None)


def _divergences(
    run: Run,
    model: StreamedModel,
    tokens: TokenSet,
    stream: Stream,
    changed: Sequence[torch.Tensor],
) -> list[float]:
    """Of every changed stream's final distribution from the original's: the mean KL, nats."""
    model.load_outside()
    trackers = [ReceiptTracker(tokens) for _ in changed]
    for row in range(len(tokens.domains)):
        wanted = sequence_logits(model, tokens, stream.hidden, row)
        for tracker, hidden in zip(trackers, changed, strict=True):
            tracker.add(row, wanted, sequence_logits(model, tokens, hidden, row))
    model.drop_outside()
    return [tracker.result()["kl"] for tracker in trackers]


def _one_layer(
    run: Run,
    model: StreamedModel,
    index: int,
    stream: Stream,
    changed: dict[int, torch.Tensor],
) -> tuple[float, ...] | None:
    """Take all streams through a loaded layer; begin the one in which this layer is narrowed. Returns its curve."""
    entered = stream.hidden.clone()
    tap = None
    if index in model.experts:
        module = model.experts[index][1]
        tap = RoutedTap()
        tap.tokens = TokenRecorder()
        attach(module, tap)
    run_layer(model, index, stream, tap)
    if tap is not None and tap.tokens is not None:
        taken, tap.tokens = tap.tokens.result(), None
    for hidden in changed.values():
        run_layer(model, index, Stream(stream.batches, stream.keep, hidden), tap)
    if tap is None:
        return None
    layer = _Narrowed(run, module, index, taken)
    mapped = layer.stand_ins(run.uniform((index,)))
    attach(module, mapped)
    changed[index] = entered
    run_layer(model, index, Stream(stream.batches, stream.keep, entered), mapped)
    attach(module, RoutedTap())  # the tap holds on to the layer's weights
    return layer.curve()
