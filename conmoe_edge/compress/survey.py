"""Before the consolidation: what each layer is worth to the output, and how many prototypes it gets for that.

Peak memory: one decoder layer, the hidden states of a few sequences once for every MoE layer, the
logits of one sequence twice.
"""

from __future__ import annotations

import torch

from conmoe_edge.checkpoint.manifest import ExpertId, SlotRecord
from conmoe_edge.compress.budgets import LayerWorth, share_out
from conmoe_edge.compress.closed_form import SAMPLE_TOKENS, slot_errors
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
    """What each layer is worth: the original over a few sequences, and beside it, from every MoE
    layer on, the stream in which only this layer was consolidated.
    """
    tokens = run.job.train.some(sequences(run.layers))
    with run.clock.part("survey"):
        model.load_outside()
        stream = open_stream(model, tokens)
        model.drop_outside()
        changed: dict[int, torch.Tensor] = {}
        curves: dict[int, list[float]] = {}
        for index in range(run.layers):
            run.announce("survey", index)
            with run.loaded(model, index, with_experts=True):
                left = _one_layer(run, model, index, stream, changed)
                if left is not None:
                    curves[index] = left
        model.load_outside()
        trackers = {layer: ReceiptTracker(tokens) for layer in curves}
        for row in range(len(tokens.domains)):
            wanted = sequence_logits(model, tokens, stream.hidden, row)
            for layer, tracker in trackers.items():
                tracker.add(row, wanted, sequence_logits(model, tokens, changed[layer], row))
        model.drop_outside()
    worth = {
        layer: LayerWorth(tuple(left), trackers[layer].result()["kl"])
        for layer, left in curves.items()
    }
    for alike in scopes(run.job.anatomy, run.layers):  # runs of layers whose records are alike
        counts = share_out([worth[layer] for layer in alike], run.uniform(alike[:1]))
        for layer, count in zip(alike, counts, strict=True):
            run.journal.budgets[str(layer)] = count
    run.save("calibrate", 0)


def _one_layer(
    run: Run,
    model: StreamedModel,
    index: int,
    stream: Stream,
    changed: dict[int, torch.Tensor],
) -> list[float] | None:
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
    chosen = select(errors, run.uniform((index,)))
    slots = [
        SlotRecord(None if prototype is None else ExpertId(index, prototype), scale)
        for prototype, scale in assign(errors, chosen)
    ]
    parts = {ExpertId(index, one): weights.parts(one) for one in chosen}
    mapped = MappedTap(slots, parts, None)
    attach(module, mapped)
    changed[index] = entered
    run_layer(model, index, Stream(stream.batches, stream.keep, entered), mapped)
    attach(module, RoutedTap())  # the tap holds on to the layer's weights
    return curve(errors)
