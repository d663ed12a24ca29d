"""A scope is decided, and its prototypes are written, when its last layer has run.

Before that the experts of its earlier layers wait in the run's work folder, as records.

Peak memory: the scope's last layer, and what the method takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.checkpoint.format.records import make_layout
from conmoe_edge.checkpoint.package.slot_constants import write_constants
from conmoe_edge.compress.methods.interface import Decision, LayerView, ScopeView
from conmoe_edge.compress.methods.scope_pool import pool_of
from conmoe_edge.compress.quality.slot_overview import slot_distances
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.solvers.weight_distance import distances
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stats.mixed_precision import RowSample, gains, load_sample, widest
from conmoe_edge.compress.stats.output_vectors import OutputVectors
from conmoe_edge.compress.stream.scope_weights import (
    LayerWeights,
    LoadedLayer,
    ScopeWeights,
    ScratchLayer,
    matrix_views,
    record_name,
    write_experts,
)
from conmoe_edge.model.anatomy import ExpertsAnatomy
from conmoe_edge.model.router import Router, Selection
from conmoe_edge.plan.levers import record_parts, scopes, spread


def decide(
    run: Run,
    module: nn.Module,
    index: int,
    tokens: LayerTokens | None,
    routers: Callable[[], Mapping[int, Router]],
) -> torch.Tensor | None:
    """At the last layer of a scope: decide and write its prototypes. Before that: keep the layer's experts.

    ``routers`` is asked where the method changes what they may choose. Returns ``Decision.left`` where it
    holds for what was written, too: records in the checkpoint's own numbers round so little.
    """
    scope = run.scope_of[index]
    source = make_layout(record_parts(run.experts(index), "source"), "source")
    transposed = run.experts(index).transposed
    here = LoadedLayer(module)
    pool = pool_of(run.job.anatomy, scope)
    if index != scope[-1]:
        own = [expert for expert in pool if expert.layer == index]
        with run.clock.part("write"):
            write_experts(
                run.scratch(index),
                [(expert, source) for expert in own],
                ScopeWeights({index: here}, matrix_views(module)).parts,
                transposed=transposed,
            )
            if tokens is not None:
                tokens.save(run.tokens_file(index))
        return None
    layers: dict[int, LayerWeights] = {index: here}
    earlier = [ScratchLayer(run.scratch(layer), source) for layer in scope[:-1]]
    layers.update(zip(scope[:-1], earlier, strict=True))
    weights = ScopeWeights(layers, matrix_views(module))
    selections = {}
    if run.method.reroutes:
        selections = {layer: router.selection for layer, router in routers().items()}
    decision = _decision(run, pool, scope, weights, module, tokens, selections)
    parts = weights.parts if decision.parts is None else decision.parts
    with run.clock.part("precision"):
        kinds = _kinds_of(run, module, scope, pool, decision, parts)
    most = run.widths(index)[-1]
    widths = {expert: decision.widths.get(expert, most) for expert in kinds}
    with run.clock.part("write"):
        path = run.package / f"prototypes-{scope[0]:05d}.safetensors"
        records = [
            (expert, run.layout(index, kind, widths[expert])) for expert, kind in kinds.items()
        ]
        written = write_experts(path, records, parts, transposed=transposed)
    run.note(written)
    for expert, kind in kinds.items():
        name = record_name(expert)
        run.journal.records[name] = [written.name, written.offsets[name], kind, widths[expert]]
    _keep(run, pool, decision, weights)
    for layer in earlier:
        layer.close()
    return decision.left if set(kinds.values()) == {"source"} else None


def _keep(run: Run, pool: Sequence[ExpertId], decision: Decision, weights: ScopeWeights) -> None:
    """Slots, their distances and notes into the journal, constants beside it."""
    with run.clock.part("distance"):
        run.journal.distances.update(slot_distances(pool, decision.slots, weights))
    for layer, constants in sorted(decision.constants.items()):
        file = run.constants_file(layer)
        write_constants(file, {layer: constants})
    for layer in sorted({expert.layer for expert in pool}):
        run.journal.decisions[str(layer)] = [
            [
                list(record.prototype) if record.prototype else None,
                record.scale,
                record.constant,
            ]
            for expert, record in zip(pool, decision.slots, strict=True)
            if expert.layer == layer
        ]
    for layer in sorted(decision.rerouted):
        run.journal.rerouted[str(layer)] = True
    run.journal.notes += [note for note in decision.notes if note not in run.journal.notes]


def _decision(
    run: Run,
    pool: Sequence[ExpertId],
    layers: Sequence[int],
    weights: ScopeWeights,
    module: nn.Module,
    tokens: LayerTokens | None,
    selections: Mapping[int, Selection],
) -> Decision:
    def measure() -> torch.Tensor:
        with run.clock.part("distance"):
            return distances(weights)

    def view_of(layer: int) -> LayerView:
        seen = tokens
        if layer != layers[-1] and run.method.needs.tokens:
            seen = LayerTokens.load(run.tokens_file(layer))
        return LayerView(
            layer,
            run.experts(layer).count,
            run.top_k(layer),
            run.statistics_of(layer),
            seen,
            OutputVectors.load(run.vectors_file(layer)) if run.method.needs.vectors else None,
            selections.get(layer),
        )

    scope = ScopeView(
        tuple(pool),
        tuple(view_of(layer) for layer in layers),
        weights,
        measure,
        module,
        run.widths(layers[-1]),
        run.sizes(layers[-1]),
        run.room(layers) if run.differs else 0,
        run.dtype,
        run.job.device,
    )
    with run.clock.part("method"):
        return run.method.decide(scope, run.count(layers))


def _kinds_of(
    run: Run,
    module: nn.Module,
    scope: Sequence[int],
    pool: Sequence[ExpertId],
    decision: Decision,
    parts: Callable[[ExpertId], Mapping[str, torch.Tensor]],
) -> dict[ExpertId, str]:
    """The kind of record of each prototype: in a mixed precision the wide one where it helps most."""
    if len(run.kinds) == 1:
        return dict.fromkeys(decision.prototypes, run.kinds[0])
    wide, narrow = run.kinds
    every = scopes(run.job.anatomy, run.job.scope)
    counts = [run.count(one) for one in every]
    count = spread(run.job.wide_prototypes, counts)[every.index(tuple(scope))]
    if count in (0, len(decision.prototypes)):
        return dict.fromkeys(decision.prototypes, wide if count else narrow)
    width = run.widths(scope[0])[-1]
    found = gains(
        module,
        decision.prototypes,
        decision.slots,
        pool,
        {layer: load_sample(run.sample_file(layer)) for layer in scope},
        parts,
        (run.layout(scope[0], wide, width), run.layout(scope[0], narrow, width)),
        run.dtype,
        run.job.device,
    )
    chosen = widest(found, count)
    return {
        expert: wide if position in chosen else narrow
        for position, expert in enumerate(decision.prototypes)
    }


def row_sample(run: Run, experts: ExpertsAnatomy) -> RowSample | None:
    """Where the precision is mixed: hidden rows to measure it on."""
    if len(run.kinds) == 1:
        return None
    return RowSample(experts.count, run.job.anatomy.hidden_size)
