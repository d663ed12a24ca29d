"""Before the consolidation: whether layers should share their prototypes, where nobody said.

For every scope to try, the method decides on what a few calibration sequences show it; then the whole model as it would
be runs on a few others, beside the original, and the divergence of its output is measured. Prototypes are experts as
they are (``Method.keeps``), so nothing is made for it: their records lie in the work folder until the layers that share
them have run.

Layers are taken as many at a time as the largest scope has. Each is read twice: once with its experts, for the
original's streams and for the decisions, and once without, for the streams of the others. So the cost is linear in the
depth. A run that is stopped in here begins with it anew, and comes to the same.

Peak memory: one decoder layer and the prototypes of another, the hidden states of a few sequences once for every scope,
the logits of one sequence twice. Disk: the experts of a scope's layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import SlotRecord
from conmoe_edge.compress.methods.interface import LayerView, ScopeView
from conmoe_edge.compress.phases.originals import SEQUENCES, Originals, fitted_sequences
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.solvers.weight_distance import distances
from conmoe_edge.compress.stats.statistics import StatisticsTracker, VectorTracker
from conmoe_edge.compress.stream.expert_hooks import MappedTap, RoutedTap, attach
from conmoe_edge.compress.stream.layer_stream import run_layer
from conmoe_edge.compress.stream.scope_weights import (
    LoadedLayer,
    ScopeWeights,
    ScratchLayer,
    matrix_views,
    write_experts,
)
from conmoe_edge.compress.stream.streamed_model import timed_layer
from conmoe_edge.model.rerouting import rerouted
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.levers import kept, record_parts, scopes


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one scope makes of a layer: its slots, constants [n, H] where it has any, and whether its router is kept to
    the slots that are not dropped.
    """

    slots: tuple[SlotRecord, ...]
    constants: Tensor | None
    rerouted: bool

    @property
    def is_open(self) -> list[bool] | None:
        return [not slot.dropped for slot in self.slots] if self.rerouted else None


def pool_trial(run: Run, model: StreamedModel, tried: Sequence[int]) -> dict[int, float]:
    """The divergence of the whole model's output with every scope of ``tried``, nats a token."""
    if run.method.reroutes:
        model.routers()  # looked for while nothing is loaded
    with run.clock.part("scope"):
        fitted = Originals(run, model, fitted_sequences(run), 0)
        measured = Originals(run, model, SEQUENCES, 1, len(tried))
        hidden = {scope: measured.stream.hidden.clone() for scope in tried}
        first = 0
        for pool in scopes(run.job.anatomy, max(tried)):
            for index in range(first, pool[0]):
                _dense(run, model, index, fitted, measured, hidden)
            _pool(run, model, pool, fitted, measured, hidden)
            first = pool[-1] + 1
        for index in range(first, run.layers):
            _dense(run, model, index, fitted, measured, hidden)
        found = measured.divergences([*hidden.values()])
    return dict(zip(tried, found, strict=True))


def _dense(
    run: Run,
    model: StreamedModel,
    index: int,
    fitted: Originals,
    measured: Originals,
    hidden: Mapping[int, Tensor],
) -> None:
    """All streams through a layer without experts."""
    run.meter.announce("scope", index)
    with timed_layer(model, index, run.clock, with_experts=True):
        run_layer(model, index, fitted.stream, None)
        measured.all_through(index, [*hidden.values()])


def _pool(
    run: Run,
    model: StreamedModel,
    pool: Sequence[int],
    fitted: Originals,
    measured: Originals,
    hidden: Mapping[int, Tensor],
) -> None:
    """All streams through the layers of the largest scope."""
    views: dict[int, LayerView] = {}
    scratch: dict[int, ScratchLayer] = {}
    decided: dict[int, dict[int, _Layer]] = {}
    inside = range(pool[0], pool[-1] + 1)
    with ExitStack() as stack:
        for index in inside:
            run.meter.announce("scope", index)
            with timed_layer(model, index, run.clock, with_experts=True):
                if index not in model.experts:
                    run_layer(model, index, fitted.stream, None)
                    measured.all_through(index, [])
                    continue
                views[index] = _seen(run, model, index, fitted)
                measured.all_through(index, [])
                module = model.experts[index][1]
                scratch[index] = stack.enter_context(_on_disk(run, index, module))
                if index == pool[-1]:
                    weights = ScopeWeights(scratch, matrix_views(module))
                    decided = {
                        scope: _decided(run, module, pool, scope, views, weights)
                        for scope in hidden
                    }
        for index in inside:
            run.meter.announce("scope", index)
            with timed_layer(model, index, run.clock, with_experts=False):
                if index not in views:
                    measured.beside.run_layer(index, [*hidden.values()], None)
                    continue
                for scope, stream in hidden.items():
                    _through(model, index, decided[scope][index], scratch, measured, stream)
    run.work.drop_scope(pool)


def _seen(run: Run, model: StreamedModel, index: int, fitted: Originals) -> LayerView:
    """What the method sees of a loaded layer; takes the fitted stream through it."""
    experts = run.sizes.experts(index)
    tap = RoutedTap()
    tracker = tap.tracker = StatisticsTracker(experts.count)
    if run.method.needs.vectors:
        tap.vectors = VectorTracker(experts.count, experts.outputs)
    attach(model.experts[index][1], tap)
    run_layer(model, index, fitted.stream, tap)
    vectors = None if tap.vectors is None else tap.vectors.result()
    selection = model.routers()[index].selection if run.method.reroutes else None
    return LayerView(
        index, experts.count, experts.top_k, tracker.result(), None, vectors, selection
    )


def _on_disk(run: Run, index: int, module: nn.Module) -> ScratchLayer:
    """A loaded layer's experts in the work folder."""
    experts = run.sizes.experts(index)
    layout = make_layout(record_parts(experts, "source"), "source")
    here = ScopeWeights({index: LoadedLayer(module)}, matrix_views(module))
    path = run.work.experts(index)
    records = [(expert, layout) for expert in run.sizes.pool((index,))]
    write_experts(path, records, here.parts, transposed=experts.transposed)
    return ScratchLayer(path, layout)


def _decided(
    run: Run,
    module: nn.Module,
    pool: Sequence[int],
    scope: int,
    views: Mapping[int, LayerView],
    weights: ScopeWeights,
) -> dict[int, _Layer]:
    """Every layer of the pool, where so many share their prototypes."""
    found: dict[int, _Layer] = {}
    for start in range(0, len(pool), scope):
        layers = pool[start : start + scope]
        own = ScopeWeights({one: weights.layer(one) for one in layers}, matrix_views(module))
        experts = run.sizes.pool(layers)
        view = ScopeView(
            experts,
            tuple(views[layer] for layer in layers),
            own,
            lambda own=own: distances(own),
            module,
            dtype=run.dtype,
            device=run.job.device,
        )
        decision = run.method.decide(view, kept(len(experts), run.sizes.rate))
        for layer in layers:
            slots = zip(experts, decision.slots, strict=True)
            found[layer] = _Layer(
                tuple(slot for expert, slot in slots if expert.layer == layer),
                decision.constants.get(layer),
                layer in decision.rerouted,
            )
    return found


def _through(
    model: StreamedModel,
    index: int,
    layer: _Layer,
    scratch: Mapping[int, ScratchLayer],
    measured: Originals,
    stream: Tensor,
) -> None:
    """One changed model's stream through a layer whose own experts are not loaded."""
    used = {slot.prototype for slot in layer.slots if slot.prototype is not None}
    parts = {one: scratch[one.layer].parts(one.expert) for one in sorted(used)}
    module = model.experts[index][1]
    tap = MappedTap.of(layer.slots, parts, layer.constants, index, layer.is_open)
    attach(module, tap)
    is_open = layer.is_open
    with nullcontext() if is_open is None else rerouted(model.routers()[index], is_open):
        measured.beside.run_layer(index, [stream], tap)
    attach(module, RoutedTap())  # the tap holds on to the prototypes
