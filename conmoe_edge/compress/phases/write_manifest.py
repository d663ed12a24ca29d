"""From a run that is done to the manifest of its package. Pure."""

from __future__ import annotations

from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest, PrototypeEntry, RecordLayout
from conmoe_edge.compress.quality.slot_overview import overview_of
from conmoe_edge.compress.run.state import Run, expert_of
from conmoe_edge.compress.stream.scope_weights import record_name


def describe(run: Run) -> Manifest:
    """The manifest of a run that is done."""
    layers = [layer.index for layer in run.job.anatomy.moe_layers]
    slots = {layer: run.slots(layer) for layer in layers}
    carried: dict[ExpertId, float] = {}
    total = sum(sum(run.statistics_of(layer).gates) for layer in layers) or 1.0
    for layer in layers:
        for record, gates in zip(slots[layer], run.statistics_of(layer).gates, strict=True):
            if record.prototype is not None:
                carried[record.prototype] = carried.get(record.prototype, 0.0) + gates
    layouts: list[RecordLayout] = []
    entries = []
    for expert in sorted(expert_of(name) for name in run.journal.records):
        file, offset, kind, width = run.journal.records[record_name(expert)]
        layout = run.layout(expert.layer, kind, width)
        if layout not in layouts:
            layouts.append(layout)
        weight = carried.get(expert, 0.0) / total
        entries.append(PrototypeEntry(expert, file, offset, layouts.index(layout), weight))
    return Manifest(
        source=dict(run.job.source),
        method=run.job.method,
        rate=run.job.rate,
        scope=run.job.scope,
        precision=run.job.precision,
        dense_precision=run.job.dense_precision,
        layouts=tuple(layouts),
        prototypes=tuple(entries),
        slots=slots,
        files=dict(sorted(run.journal.files.items())),
        plan=dict(run.job.plan),
        receipt=run.journal.receipt,
        notes=tuple(run.journal.notes),
        overview=overview_of(
            {layer: run.statistics_of(layer) for layer in layers}, run.journal.distances
        ),
        tool_version=run.job.tool_version,
        rerouted=tuple(layer for layer in layers if run.is_rerouted(layer)),
    )
