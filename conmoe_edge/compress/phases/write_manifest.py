"""From what a run decided and wrote to the manifest of its package. Pure."""

from __future__ import annotations

from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest, PrototypeEntry, RecordLayout
from conmoe_edge.compress.quality.layer_originals import originals_of
from conmoe_edge.compress.quality.slot_overview import overview_of
from conmoe_edge.compress.run.job import Job
from conmoe_edge.compress.run.journal import Journal
from conmoe_edge.compress.run.record_sizes import RecordSizes


def describe(job: Job, sizes: RecordSizes, journal: Journal) -> Manifest:
    """The manifest of a run whose layers are all decided; without a receipt until that is measured."""
    layers = sizes.moe_layers
    slots = {layer: journal.slots(layer) for layer in layers}
    statistics = journal.statistics_of(layers)
    carried: dict[ExpertId, float] = {}
    total = sum(sum(statistics[layer].gates) for layer in layers) or 1.0
    for layer in layers:
        for record, gates in zip(slots[layer], statistics[layer].gates, strict=True):
            if record.prototype is not None:
                carried[record.prototype] = carried.get(record.prototype, 0.0) + gates
    layouts: list[RecordLayout] = []
    entries = []
    for expert, stored in journal.stored().items():
        layout = sizes.layout(expert.layer, stored.kind, stored.width)
        if layout not in layouts:
            layouts.append(layout)
        weight = carried.get(expert, 0.0) / total
        number = layouts.index(layout)
        entries.append(PrototypeEntry(expert, stored.file, stored.offset, number, weight))
    return Manifest(
        source=dict(job.source),
        method=job.method,
        rate=job.rate,
        scope=job.scope,
        precision=job.precision,
        dense_precision=job.dense_precision,
        layouts=tuple(layouts),
        prototypes=tuple(entries),
        slots=slots,
        files=dict(sorted(journal.files.items())),
        plan=dict(job.plan),
        receipt=journal.receipt,
        notes=tuple(journal.notes),
        overview=overview_of(statistics, journal.distances),
        originals=originals_of(job.anatomy, journal.worth),
        tool_version=job.tool_version,
        rerouted=tuple(layer for layer in layers if journal.open_slots(layer) is not None),
        prefill_chunk=job.plan.get("prefill_chunk"),
        kv_precision=job.decided.kv_precision,
    )
