"""Before the consolidation: what each layer is worth to the output, and how many prototypes it gets for that.

First the original over a few calibration sequences, and beside it, from every layer on, the stream in
which that layer alone was consolidated with the uniform number of prototypes; ``budgets`` makes a
division of the prototypes from that. Then the trial: over other sequences, the whole model with the
uniform division, with this one, and with one half way; the one whose final distribution is nearest
to the original's is taken (ties to the uniform one). Prototypes are pretrained experts with scales in
both, nothing is trimmed or refitted.

Peak memory: one decoder layer, the hidden states of a few sequences once for every MoE layer, the
logits of one sequence twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from conmoe_edge.checkpoint.manifest import ExpertId, SlotRecord
from conmoe_edge.compress.budgets import LayerWorth, between, share_out
from conmoe_edge.compress.calibration import TokenSet
from conmoe_edge.compress.closed_form import SAMPLE_TOKENS, SlotErrors, slot_errors
from conmoe_edge.compress.facility import assign, curve, select
from conmoe_edge.compress.layer_tokens import TokenRecorder
from conmoe_edge.compress.receipt import ReceiptTracker
from conmoe_edge.compress.run import Run
from conmoe_edge.compress.stream import Stream, open_stream, run_layer, sequence_logits
from conmoe_edge.compress.taps import MappedTap, RoutedTap, attach
from conmoe_edge.compress.weights import LoadedLayer
from conmoe_edge.model.experts import expert_forward
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
    errors: dict[int, SlotErrors] = {}
    with run.clock.part("survey"):
        worth = _worth(run, model, errors)
        uniform, shared = {}, {}
        for alike in scopes(run.job.anatomy, run.layers):  # runs of layers whose records are alike
            each = run.uniform(alike[:1])
            uniform.update(dict.fromkeys(alike, each))
            shared.update(zip(alike, share_out([worth[one] for one in alike], each), strict=True))
        half = dict(zip(uniform, between([*uniform.values()], [*shared.values()]), strict=True))
        divisions = [uniform]
        divisions += [one for one in (shared, half) if one not in divisions]
        left = _trial(run, model, errors, divisions) if len(divisions) > 1 else [0.0]
    for layer, count in divisions[left.index(min(left))].items():
        run.journal.budgets[str(layer)] = count
    run.save("calibrate", 0)


def _worth(run: Run, model: StreamedModel, errors: dict[int, SlotErrors]) -> dict[int, LayerWorth]:
    """What each layer is worth; ``errors`` is filled."""
    tokens = run.job.train.some(sequences(run.layers))
    model.load_outside()
    stream = open_stream(model, tokens)
    model.drop_outside()
    changed: dict[int, torch.Tensor] = {}
    for index in range(run.layers):
        run.announce("survey", index)
        with run.loaded(model, index):
            found = _one_layer(run, model, index, stream, changed)
            if found is not None:
                errors[index] = found
    left = _divergences(run, model, tokens, stream, [changed[layer] for layer in errors])
    return {
        layer: LayerWorth(tuple(curve(found)), divergence)
        for (layer, found), divergence in zip(errors.items(), left, strict=True)
    }


def _trial(
    run: Run,
    model: StreamedModel,
    errors: Mapping[int, SlotErrors],
    divisions: Sequence[Mapping[int, int]],
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
            if index not in errors:
                for one in (stream, *tried):
                    run_layer(model, index, one, None)
                continue
            module = model.experts[index][1]
            own = RoutedTap()
            attach(module, own)
            run_layer(model, index, stream, own)
            for one, division in zip(tried, divisions, strict=True):
                mapped = _stand_ins(module, index, errors[index], division[index])
                attach(module, mapped)
                run_layer(model, index, one, mapped)
            attach(module, RoutedTap())  # the tap holds on to the layer's weights
    return _divergences(run, model, tokens, stream, [one.hidden for one in tried])


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


def _stand_ins(module: nn.Module, index: int, errors: SlotErrors, keep: int) -> MappedTap:
    """A loaded layer with ``keep`` of its experts for all slots."""
    weights = LoadedLayer(module)
    chosen = select(errors, keep)
    slots = [
        SlotRecord(None if prototype is None else ExpertId(index, prototype), scale)
        for prototype, scale in assign(errors, chosen)
    ]
    return MappedTap(slots, {ExpertId(index, one): weights.parts(one) for one in chosen}, None)


def _one_layer(
    run: Run,
    model: StreamedModel,
    index: int,
    stream: Stream,
    changed: dict[int, torch.Tensor],
) -> SlotErrors | None:
    """Take all streams through a loaded layer; begin the one in which this layer is consolidated."""
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
    weights = LoadedLayer(module)

    def forward(expert: int, hidden: torch.Tensor) -> torch.Tensor:
        moved = hidden.to(model.device, model.dtype)
        return expert_forward(module, moved, weights.parts(expert), model.dtype)

    count = run.experts(index).count
    errors = slot_errors(taken.sample(SAMPLE_TOKENS), count, forward)
    mapped = _stand_ins(module, index, errors, run.uniform((index,)))
    attach(module, mapped)
    changed[index] = entered
    run_layer(model, index, Stream(stream.batches, stream.keep, entered), mapped)
    attach(module, RoutedTap())  # the tap holds on to the layer's weights
    return errors
