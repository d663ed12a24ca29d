"""Before the consolidation: what each layer is worth to the output, and how much each gets for that.

Worth: the original goes over a few calibration sequences. Every layer also runs narrowed, with the uniform number of
bytes, on what the original has in front of it, and what that changes in the residual stream, as a share of it, is the
layer's worth. ``layer_budgets.py`` makes a division of the bytes from that. A layer is measured at its place alone, so
the cost is linear in the depth.

Trial: the whole model with the uniform division, with this one, and with one half way. The one whose final distribution
is nearest to the original's is taken (ties to the more uniform one).

A narrowed layer has stand-ins for its experts (``methods/narrowing.py``); nothing is refitted. Stand-ins are made from
some sequences, worth is measured on others, and the trial on others again. The tokens of the first wait in the work
folder for the trial.

Peak memory: one decoder layer, stand-ins of one division (``stand_ins.py``), the hidden states of a few sequences once
for every division; the logits of one sequence twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from conmoe_edge.compress.methods.interface import LayerView, ScopeView
from conmoe_edge.compress.methods.stand_ins import NarrowedLayer, StandInLayer
from conmoe_edge.compress.phases.originals import SEQUENCES, Originals, fitted_sequences
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.solvers.layer_budgets import LayerWorth, between, share_out
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stats.statistics import StatisticsTracker
from conmoe_edge.compress.stream.expert_hooks import RoutedTap, attach
from conmoe_edge.compress.stream.scope_weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.compress.stream.streamed_model import timed_layer
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.levers import scopes


def survey(run: Run, model: StreamedModel) -> dict[int, int]:
    """MoE layer -> prototypes, or parts of them where their widths differ. Its worth goes into the journal."""
    with run.clock.part("survey"):
        found: dict[int, NarrowedLayer] = {}
        worth = _worth(run, model, found)
        run.journal.worth = {str(layer): one.divergence for layer, one in worth.items()}
        uniform, shared = {}, {}
        for alike in scopes(run.job.anatomy, run.layers):  # runs of layers whose records are alike
            each = run.sizes.uniform(alike[:1])
            uniform.update(dict.fromkeys(alike, each))
            shared.update(zip(alike, share_out([worth[one] for one in alike], each), strict=True))
        half = dict(zip(uniform, between([*uniform.values()], [*shared.values()]), strict=True))
        divisions = [uniform]
        divisions += [one for one in (half, shared) if one not in divisions]
        left = _trial(run, model, found, divisions) if len(divisions) > 1 else [0.0]
    return divisions[left.index(min(left))]


def _worth(
    run: Run, model: StreamedModel, found: dict[int, NarrowedLayer]
) -> dict[int, LayerWorth]:
    """What each layer is worth; ``found`` is filled."""
    fitted = Originals(run, model, fitted_sequences(run), 0)
    measured = Originals(run, model, SEQUENCES, 1)
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
                uniform = run.sizes.uniform((index,))
                _run_narrowed(measured, layer, found[index], uniform, changed)
                layer = recorded = None  # the next one needs the room
                worth[index] = LayerWorth(found[index].curve(), measured.changed_by(changed))
    return worth


def _trial(
    run: Run,
    model: StreamedModel,
    found: Mapping[int, NarrowedLayer],
    divisions: Sequence[Mapping[int, int]],
) -> list[float]:
    """The divergence of the whole model's output with every division."""
    measured = Originals(run, model, SEQUENCES, 2, len(divisions))
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
                _run_narrowed(measured, layer, found[index], division[index], one)
            layer = None  # it holds on to the layer's weights, and to stand-ins
    return measured.divergences(tried)


def _run_narrowed(
    measured: Originals,
    layer: StandInLayer,
    narrowed: NarrowedLayer,
    units: int,
    hidden: torch.Tensor,
) -> None:
    """``hidden`` through a loaded layer in so many units, in place."""
    mapped = layer.tap(narrowed, units)
    attach(layer.module, mapped)
    measured.beside.run_layer(layer.index, [hidden], mapped)
    attach(layer.module, RoutedTap())  # the tap holds on to the stand-ins


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
